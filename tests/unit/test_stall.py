"""What a rank sees of the others, who leads and judges, and when a run stands still: no training, few processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from megacode.errors import UserError
from megacode.parallel import heartbeat
from megacode.parallel.heartbeat import Heartbeat, read
from megacode.plan.layout import Layout
from megacode.train import sight
from megacode.train.faults import Peer, _started, this_process
from megacode.train.sight import Machine, Others, shared_folder
from megacode.train.stacks import Stacks
from megacode.train.stall import EXIT_STALLED, StallWatch, _end
from megacode.train.verdict import Seen

PERIOD = 0.01


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "shared").mkdir()
    yield tmp_path
    heartbeat.end()


def beat(folder, rank, pid):
    """A rank that is another process."""
    return Heartbeat(folder / f"rank_{rank:05d}", rank, pid, _started(pid) or 0, "elsewhere")


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_machine_tells_how_processes_are(folder, sleeper, monkeypatch):
    monkeypatch.setattr(sight, "SLACK_SECONDS", 0.2)
    beat(folder, 1, sleeper.pid)
    own = beat(folder, 0, os.getpid())
    machine = Machine(folder, PERIOD)
    assert {rank: process for rank, (_, process) in machine.look().items()} == {0: "runs", 1: "runs"}
    time.sleep(0.5)
    own.beat()
    assert {rank: process for rank, (_, process) in machine.look().items()} == {0: "runs", 1: "held"}
    sleeper.send_signal(signal.SIGSTOP)
    wait_until(lambda: machine.look()[1][1] == "stopped")
    sleeper.kill()
    wait_until(lambda: machine.look()[1][1] == "ended")


def test_what_an_earlier_start_left_is_not_seen(folder, sleeper):
    beat(folder, 1, sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert Machine(folder, PERIOD).look() == {}
    own = beat(folder, 2, os.getpid())
    own.beat()
    other = Heartbeat(folder / "rank_00003", 3, os.getpid(), 12345, "elsewhere")  # the number of another process now
    other.beat()
    assert set(Machine(folder, PERIOD).look()) == {2}


def test_machines_tell_each_other(folder, sleeper):
    here, there = Others(folder / "run", PERIOD), Others(folder / "run", PERIOD)
    mine = beat(folder, 4, sleeper.pid)
    machine = Machine(folder, PERIOD)
    there.publish(4, machine.look())
    assert here.look() == {}  # of an earlier start, for all that is known
    mine.do("reading data", patient=False)
    there.publish(4, machine.look())
    record, process = here.look()[4]
    assert (record, process) == (read(folder / "rank_00004"), "runs")
    assert record.state == "reading data"
    here.patience_seconds = 0.1
    time.sleep(0.2)
    assert here.look()[4][1] == "unheard"
    mine.beat()
    there.publish(4, machine.look())
    assert here.look()[4][1] == "runs"
    (folder / "run" / "heartbeats" / "rank_00004.json").write_text('[{"rank"')  # half written
    assert here.look()[4][1] == "runs"  # as it was


def test_whom_another_rank_of_the_machine_tells_of_later_counts(folder, sleeper):
    here, first, second = (Others(folder / "run", PERIOD) for _ in range(3))
    here.look()
    mine = beat(folder, 4, sleeper.pid)
    machine = Machine(folder, PERIOD)
    first.publish(4, machine.look())
    here.look()
    time.sleep(0.05)
    mine.do("logging", patient=False)
    second.publish(5, machine.look())
    assert here.look()[4][0].state == "logging"


def test_runs_have_folders_of_their_own(tmp_path):
    one, other = (shared_folder(tmp_path / name, tmp_path) for name in ("one", "other"))
    assert one != other
    assert one == shared_folder(tmp_path / "one", tmp_path)
    assert one.stat().st_mode & 0o777 == 0o700


def watch(folder, rank=0, world_size=1, stall_seconds=4.0, claim=lambda verdict: EXIT_STALLED, root="shared"):
    layout = Layout(1, world_size, 1, 1, 1, (range(1),))
    looked, told = [], []
    stall = StallWatch(
        folder / "run", this_process(rank), layout, stall_seconds, claim, told.append, looked.append,
        folder / root,
    )  # fmt: skip
    stall._leave = lambda code, processes: told.append((code, processes))  # this process goes on
    return stall, looked, told


def test_no_room_for_heartbeats_is_a_users_mistake(folder, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"heartbeats can't be kept there \(No space left on device\); make room"):
        watch(folder)


def test_a_run_that_stands_still_is_judged_once(folder):
    stall, looked, told = watch(folder)
    stall._look()
    assert looked
    assert not told
    stall.stall_seconds = 0.1
    time.sleep(0.2)
    heartbeat.doing("logging")
    stall._look()
    assert not told  # it has gone on
    time.sleep(0.2)
    stall._look()
    verdict, left = told
    assert verdict.culprits == [0]
    me = this_process(0)
    assert left == (76, [[0, me.host, me.pid, me.started]])
    assert stall._told() == left
    (stacks,) = (folder / "run/stacks").iterdir()
    assert "test_a_run_that_stands_still" in stacks.read_text()
    stall.stop()
    assert not list((folder / "shared").iterdir())


def test_a_verdict_on_an_earlier_start_is_not_obeyed(folder):
    stall, _, told = watch(folder)
    (folder / "run" / "heartbeats").mkdir()
    me = this_process(0)
    for processes in ([[0, me.host, me.pid, 1]], [[1, me.host, me.pid, me.started]], []):
        stall._verdict_file.write_text(json.dumps({"code": 76, "processes": processes}))
        stall.leave_if_told()
        assert not told
    for half in ("", '{"processes"'):
        stall._verdict_file.write_text(half)
        stall.leave_if_told(wait_seconds=0.2)
        assert not told
    stall._verdict_file.write_text(json.dumps({"code": 76, "processes": [[0, me.host, me.pid, me.started]]}))
    stall.leave_if_told()
    assert told
    stall.stop()


def test_a_rank_that_comes_to_the_end_after_a_verdict_is_told(folder):
    stall, _, told = watch(folder)
    stall.others.folder.mkdir()
    me = this_process(0)
    mine = [[0, me.host, me.pid, me.started]]
    stall._verdict_file.write_text(json.dumps({"code": 76, "processes": mine}))
    stall.stop()
    assert told == [(76, mine)]


def test_no_verdict_where_the_run_has_failed_otherwise(folder):
    stall, looked, told = watch(folder, stall_seconds=0.005, claim=lambda verdict: 1)
    stall._look()
    time.sleep(0.01)
    stall._look()
    assert len(looked) == 2
    ((code, _),) = told  # ends without a verdict
    assert code == 1
    assert stall._told()[0] == 1
    assert not (folder / "run/stacks").exists()
    stall.stop()


def test_long_reading_and_writing_is_no_stall_unless_the_process_is_stopped(folder):
    stall, _, told = watch(folder, stall_seconds=0.05)
    heartbeat.doing("writing a checkpoint", patient=True)
    stall._look()
    time.sleep(0.1)
    stall._look()
    assert not told
    record = read(stall.machine.folder / "rank_00000")
    assert stall._patience_seconds(Seen(record, "runs", 0.0)) > 1000
    assert stall._patience_seconds(Seen(record, "held", 0.0)) > 1000
    assert stall._patience_seconds(Seen(record, "stopped", 0.0)) == 0.05
    with heartbeat.waiting("gather", "world"):
        waits = read(stall.machine.folder / "rank_00000")
    assert stall._patience_seconds(Seen(waits, "runs", 0.0)) == 0.05
    stall.stop()


def test_a_stopped_rank_0_is_judged_by_the_next(folder, sleeper):
    stall, looked, told = watch(folder, rank=1, world_size=2, stall_seconds=0.1)
    beat(stall.machine.folder, 0, sleeper.pid)
    stall._look()
    assert not looked  # rank 0 does
    sleeper.send_signal(signal.SIGSTOP)
    wait_until(lambda: stall.machine.look()[0][1] == "stopped")
    stall._look()
    time.sleep(0.2)
    stall._look()
    assert told[0].culprits == [0, 1]
    assert "rank 0 (host elsewhere, process" in told[0].conclusion
    stall.stop()


def test_one_machine_judges_and_another_where_that_is_not_heard_of(folder):
    (folder / "other").mkdir()
    first, _, told = watch(folder, world_size=2, stall_seconds=2.0)
    second, looked, told_there = watch(folder, rank=1, world_size=2, stall_seconds=2.0, root="other")
    for _ in range(2):
        for machine in (first, second):
            machine.heart.do("logging", patient=False)  # what an earlier start left would not change
            machine._looks_next = 0.0
            machine._look()
    looked.clear()
    read_files = len(second.others._last)
    second.others._last.clear()
    second._look()
    assert read_files == 2
    assert not second.others._last  # not so soon again
    second._looks_next = 0.0
    second._look()
    assert not looked
    assert not told_there
    assert [line["rank"] for line in json.loads((folder / "run/heartbeats/rank_00001.json").read_text())] == [1]
    first.stall_seconds = second.stall_seconds = second.others.patience_seconds = 0.1
    time.sleep(0.2)
    second._looks_next = 0.0
    second._look()  # nothing new of the first: its machine is dead
    verdict, (code, processes) = told_there
    assert (verdict.culprits, code, len(processes)) == ([0, 1], 76, 2)
    assert f"rank 0 (host {this_process(0).host}, process {os.getpid()}) is not heard of any more" in verdict.conclusion
    assert not told
    first.stop()
    second.stop()


def test_what_does_not_end_by_itself_is_killed(folder, sleeper, monkeypatch):
    monkeypatch.setattr("megacode.train.stall.END_SECONDS", 0.3)
    record = read(beat(folder, 1, sleeper.pid).path)
    _end([replace(record, started=1)])  # another process has its number now
    assert sleeper.poll() is None
    _end([record])
    assert sleeper.wait(5) == -signal.SIGKILL


def test_a_later_starts_files_stay(folder):
    first, _, _ = watch(folder)
    second, _, _ = watch(folder)
    first.heart.unlink()
    first.stacks.clear()
    second.stacks.forget()
    assert second.heart.path.exists()
    first.stop()
    second.stop()


def test_a_rank_that_never_started_is_missing(folder):
    stall, looked, told = watch(folder, world_size=2, stall_seconds=0.05)
    stall._look()
    time.sleep(0.1)
    stall._look()
    assert looked[-1][1].process == "missing"
    assert "rank 1 has not started" in told[0].conclusion
    stall.stop()


def test_nothing_is_written_before_the_run_folder_is_there(folder):
    stall, looked, told = watch(folder, stall_seconds=0.01)
    (folder / "run").rmdir()
    stall._look()
    time.sleep(0.02)
    stall._look()
    assert not (folder / "run").exists()
    assert not looked
    assert not told
    stall.stop()


HELD = """
import ctypes, sys
from pathlib import Path
from megacode.train.faults import this_process
from megacode.train.stacks import Stacks

def sits_in_native_code():
    ctypes.PyDLL(None).sleep(60)  # a PyDLL does not let go of the interpreter

stacks = Stacks(Path(sys.argv[1]), Path(sys.argv[2]), this_process(1))
print("ready", flush=True)
sits_in_native_code()
"""


def test_the_stack_of_a_process_whose_interpreter_is_held(folder, monkeypatch):
    monkeypatch.setattr("megacode.train.stacks.WAKE_SECONDS", 0.2)
    arguments = [sys.executable, "-c", HELD, str(folder / "run"), str(folder / "shared")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.2)
            held, held_start = beat(folder, 1, process.pid), _started(process.pid)
            mine = Stacks(folder / "run", folder / "shared", Peer(0, "here", os.getpid(), 1))
            mine.write()
            mine.wait([(0, os.getpid(), 1), (1, process.pid, held_start)], [read(held.path)], seconds=10)
            mine.close()
        finally:
            process.kill()
    assert (
        "sits_in_native_code" in (folder / f"run/stacks/rank_00001_process_{process.pid}_{held_start}.txt").read_text()
    )
    assert "test_the_stack_of_a_process" in (folder / f"run/stacks/rank_00000_process_{os.getpid()}_1.txt").read_text()
