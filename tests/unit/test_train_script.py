"""launchers/slurm/train.sbatch where SLURM fails, or does what it does elsewhere: its commands are stand-ins here.

The real ones are in tests/slurm.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.launching import ROOT

SECONDS = 60  # the machine may be busy

PYTHON = """\
# Python with megacode and deepspeed: `begin` and `end`, a launcher that starts a rank, a rank that notes what it gets.
import json, os, pathlib, signal, subprocess, sys
here, words = pathlib.Path(sys.argv[1]), sys.argv[2:]
if "begin" in words:
    print(here / "logs %t")
    (here / "logs %t").mkdir()
    (here / "begin").write_text(" ".join(words))
elif "end" in words:
    (here / "end").write_text(" ".join(words))
    sys.exit(3)
elif "deepspeed.launcher.runner" in words:
    ranks = [str(here / "python"), "-u", "-m", "megacode.train", "--local_rank=0"]
    sys.exit(subprocess.run(ranks).returncode)
else:
    def note(number, frame):
        (here / "got").write_text(signal.Signals(number).name)
        sys.exit()
    signal.signal(signal.SIGUSR1, note)
    signal.signal(signal.SIGTERM, note)
    (here / "environment.part").write_text(json.dumps(dict(os.environ)))
    (here / "environment.part").rename(here / "environment")
    while True:
        signal.pause()
"""
COMMANDS = {
    "sleep": "exec /bin/sleep 0.02",
    "scontrol": 'case "$*" in *names*) echo n1;; *node*) echo NodeAddr=127.0.0.1;; requeue*) failing requeue;; esac',
    "squeue": 'case "$*" in *--jobs=*) failing state && echo RUNNING;; *) failing queued && echo 7;; esac',
    # Only what SLURM has started itself gets a signal, as where proctrack/cgroup is.
    "scancel": 'failing asking && kill -USR1 "$(<"$here/task")"',
    "srun": 'echo $$ >"$here/task"; printf "%s\\n" "$@" >"$here/srun"; '
    'while [ "$1" != bash ]; do shift; done; exec "$@" >"$here/rank" 2>&1',
}
FAILING = """\
# The first time a command is called it fails.
failing() { echo >>"$here/$1"; [ "$(wc -l <"$here/$1")" -gt 1 ] || { echo "Socket timed out" >&2; return 1; }; }
"""


@dataclass
class Script:
    """The batch script while it runs; the rank is up."""

    folder: Path
    process: subprocess.Popen

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def wait(self) -> int:
        return self.process.wait(SECONDS)


@pytest.fixture
def start(tmp_path):
    """Starts the script, by a launcher, with more variables."""
    here = tmp_path / "here"
    here.mkdir()
    for name, text in COMMANDS.items():
        (here / name).write_text(f'#!/bin/bash\nhere="{here}"\n{FAILING}{text}\n')
    (here / "python.py").write_text(PYTHON)
    (here / "python").write_text(f'#!/bin/bash\nexec "{sys.executable}" -S -E "{here}/python.py" "{here}" "$@"\n')
    for name in (*COMMANDS, "python"):
        (here / name).chmod(0o755)
    started = []

    def begin(launcher, **variables):
        environment = {
            **os.environ, "PATH": f"{here}:{os.environ['PATH']}", "MEGACODE_PYTHON": str(here / "python"),
            "MEGACODE_LAUNCHER": launcher, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_NODEID": "0",
            "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1", **variables,
        }  # fmt: skip
        command = ["bash", str(ROOT / "launchers" / "slurm" / "train.sbatch"), "recipe.yaml"]
        script = Script(here, subprocess.Popen(command, env=environment, start_new_session=True))
        started.append(script.process)
        stop = time.monotonic() + SECONDS
        while not (here / "environment").exists():
            assert script.process.poll() is None
            assert time.monotonic() < stop
            time.sleep(0.02)
        return script

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("launcher", ["srun", "deepspeed"])
def test_a_request_reaches_ranks_and_a_busy_controller_ends_nothing(start, launcher):
    script = start(launcher)
    script.process.send_signal(signal.SIGUSR1)
    assert script.wait() == 0
    assert script.read("got") == "SIGUSR1"
    assert "--queued 7 recipe.yaml" in script.read("begin")
    assert "--state RUNNING --asked recipe.yaml" in script.read("end")
    assert [len(script.read(name)) for name in ("queued", "state", "requeue")] == [2, 2, 2], "each failed once"


def test_ranks_may_be_asked_before_the_script_is(start):
    """As in a preemption: it is SLURM that asks, so the job starts again."""
    script = start("srun")
    (script.folder / "sleep").write_text(f'#!/bin/bash\necho >"{script.folder}/slept"\nexec /bin/sleep "$@"\n')
    os.kill(int(script.read("task")), signal.SIGUSR1)
    stop = time.monotonic() + SECONDS
    while not (script.folder / "slept").exists():
        assert time.monotonic() < stop
        time.sleep(0.02)
    script.process.send_signal(signal.SIGUSR1)
    assert script.wait() == 0
    assert script.read("got") == "SIGUSR1"
    assert "--state RUNNING --asked recipe.yaml" in script.read("end")


def test_a_request_does_not_outlive_the_start_that_made_it(start):
    """SLURM's scancel tries again for minutes where the job is busy, and then its next start would hear it."""
    script = start("srun")
    tries = 'echo >"$here/tried"; exec 2>&-; /bin/sleep 6; echo >"$here/late"'
    (script.folder / "scancel").write_text(f'#!/bin/bash\nhere="{script.folder}"\n{tries}\n')
    script.process.send_signal(signal.SIGUSR1)
    stop = time.monotonic() + SECONDS
    while not (script.folder / "tried").exists():
        assert time.monotonic() < stop
        time.sleep(0.02)
    os.kill(int(script.read("task")), signal.SIGUSR1)
    assert script.wait() == 0
    time.sleep(7)
    assert not (script.folder / "late").exists()


def test_sigterm_goes_to_ranks_not_to_the_launcher(start):
    script = start("deepspeed")
    os.kill(int(script.read("task")), signal.SIGTERM)
    assert script.wait() == 0
    assert script.read("got") == "SIGTERM"
    assert "--asked" not in script.read("end")


def test_what_the_login_has_of_another_run_is_not_handed_on(start):
    script = start("srun", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", LOCAL_SIZE="1")
    script.process.send_signal(signal.SIGUSR1)
    assert script.wait() == 0
    names = json.loads(script.read("environment"))
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"} & set(names)
    assert names["MASTER_ADDR"] == "127.0.0.1"
    assert f"--output={script.folder}/logs %%t/rank_%5t.txt" in script.read("srun").splitlines()
