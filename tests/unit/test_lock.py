"""A run folder belongs to one start at a time, and to nobody once its processes are gone."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from megacode.errors import UserError
from megacode.train import lock
from megacode.train.lock import hold

HOLD = """
import sys
from pathlib import Path
from megacode.train.lock import hold
hold(Path(sys.argv[1]), int(sys.argv[2]))
"""


@contextmanager
def holder(run, rank=0, more="print('held', flush=True); sys.stdin.read()"):
    """Another process that has a rank's lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD + more, run, str(rank)],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.2)


def refusal(run, rank=0):
    with pytest.raises(UserError) as refused:
        hold(run, rank)
    return str(refused.value)


def test_a_second_start_is_told_who_has_the_folder(tmp_path):
    run = tmp_path / "new" / "run"
    with holder(run) as process:
        before = (run / "lock").read_bytes()
        text = refusal(run)
        assert text.startswith(
            f"run: {run} is in use: process {process.pid} on host {socket.gethostname()} trains in it since 20"
        )
        assert text.endswith(f"; stop that run (touch {run}/STOP) and wait for its end, or give another run=FOLDER")
        assert (run / "lock").read_bytes() == before
        assert [path.name for path in run.iterdir()] == ["lock"]


def test_a_rank_finds_its_own_number_taken(tmp_path):
    with holder(tmp_path), holder(tmp_path, rank=3):
        assert "is in use" in refusal(tmp_path, rank=3)
        hold(tmp_path, 2)


def test_a_start_that_is_killed_leaves_nothing_that_blocks(tmp_path):
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        hold(tmp_path, 0)
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_children_that_outlive_a_rank_do_not_keep_its_lock(tmp_path):
    """Neither forked ones nor those of subprocess."""
    more = """
import os, subprocess
if os.fork() == 0:
    subprocess.run(["sleep", "60"])
subprocess.Popen(["sleep", "60"])
print("held", flush=True)
os.kill(os.getpid(), 9)
"""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD + more, tmp_path, "0"],
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        process.wait()
        try:
            hold(tmp_path, 0)
        finally:
            os.killpg(process.pid, 9)


def test_a_start_waits_for_one_that_is_about_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 60)
    with holder(tmp_path, more="print('held', flush=True); import time; time.sleep(0.5)") as process:
        hold(tmp_path, 0)
        assert process.wait() == 0


def test_of_another_host_that_may_be_gone_the_line_says_what_to_wait_for(tmp_path, monkeypatch):
    with holder(tmp_path):
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        assert refusal(tmp_path).endswith(
            "; if that host is gone, the file server gives its locks back within some minutes"
        )


def test_a_lock_that_is_being_written_refuses_too(tmp_path):
    with holder(
        tmp_path, more="import os; os.truncate(sys.argv[1] + '/lock', 0); print('held', flush=True); sys.stdin.read()"
    ):
        assert refusal(tmp_path).startswith(f"run: {tmp_path} is in use: another start has it; stop that run")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_are_no_locks_rank_0_says_so_and_goes_on(tmp_path, monkeypatch, capsys, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    hold(tmp_path, 1)
    assert capsys.readouterr().err == ""
    hold(tmp_path, 0)
    told = f"{tmp_path} can't be locked ({os.strerror(code)}): nothing keeps a second start out of it\n"
    assert capsys.readouterr().err == told
    assert lock.held_since_ns(tmp_path) > 0


def test_other_errors_of_the_disk_are_none_of_these(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        hold(tmp_path, 0)
