"""What may come between a start and its first step: another start in the folder, a signal, what lies there from before."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.launching import ENVIRONMENT, ROOT, metrics, start, status, told, train, write_recipe
from support.stalling import run_ranks

from megacode.checkpoint.keep import finished, newest, step_of
from megacode.train.lock import NAME


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("start"))


@contextmanager
def started(*arguments, by=start, **more):
    """A run that is killed where a test fails."""
    with by(*arguments, **more) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_line(process, text) -> str:
    """What a process prints up to the line that holds a text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines)[-3000:])


def everything(run):
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.suffix != ".jsonl"}


def test_a_second_start_changes_nothing_and_the_first_goes_on(recipe):
    run = recipe.parent / "shared"
    endless = (f"run={run}", "schedule.steps=1000000", "checkpoint.every_steps=1000000")
    with started(recipe, *endless) as first:
        wait_for_line(first, " 2/")
        (run / "checkpoints/step_00999999.partial").mkdir(parents=True)
        before = everything(run)
        line = told(*train(recipe, f"run={run}"))
        assert line.startswith(f"run: {run} is in use: process {first.pid} on host ")
        assert line.endswith(f"stop that run (touch {run}/STOP) and wait for its end, or give another run=FOLDER")
        assert everything(run) == before
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00999999.partial"]
        assert len((run / "starts.jsonl").read_text().splitlines()) == 1
        (run / "STOP").touch()
        output, _ = first.communicate(timeout=60)
        assert first.returncode == 75, output[-3000:]
    last = status(run)["step"]
    assert (status(run)["outcome"], step_of(newest(run))) == ("stopped", last)
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, last + 1))


def test_a_run_that_was_killed_does_not_block_the_next_start(recipe):
    run = recipe.parent / "killed"
    with started(recipe, f"run={run}", "checkpoint.every_steps=1") as first:
        wait_for_line(first, " 2/")
        first.kill()
    code, output = train(recipe, f"run={run}", "schedule.steps=4")
    assert code == 0, output[-3000:]
    assert "resuming from " in output
    assert status(run)["outcome"] == "finished"


HOLD = """
import sys
from pathlib import Path
from megacode.train.lock import hold
for rank in (0, 1):
    hold(Path(sys.argv[1]), rank)
print("held", flush=True)
sys.stdin.read()
"""


def test_all_ranks_are_refused_with_one_line(recipe):
    run = recipe.parent / "held"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, run], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == "held\n"
        done = run_ranks(recipe, f"run={run}", world_size=2)
        other.stdin.close()
    assert done.codes == [2, 2], done.output
    assert f"run: {run} is in use: process {other.pid} on host " in told(2, done.output)
    assert [path.name for path in run.iterdir()] == [NAME]


def wait_until(process, true):
    deadline = time.monotonic() + 60
    while not true():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.01)


def handles(process, number):
    """Whether a process has a handler of its own for a signal."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (caught,) = (line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def stopped_by(name):
    name += ", which launchers send when a rank has died, too" * (name == "SIGTERM")
    return f"stopped before the first step: asked by {name}; nothing is lost, start again to go on\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_while_libraries_are_imported_is_one_line(recipe, number, code):
    run = recipe.parent / f"imports {number}"
    with started(recipe, f"run={run}") as process:
        wait_until(process, lambda: handles(process, signal.SIGTERM))
        wait_until(process, lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, stopped_by(signal.Signals(number).name))
    assert not run.exists()


SLOW = """
import sys, time
from megacode.train import interrupt
interrupt.begin()
from megacode.train import main, start
if "slow" in sys.argv[1]:
    start.load_weights = lambda *_: (print("loading", flush=True), time.sleep(300))
sys.exit(main.main(sys.argv[2:]))
"""


def rank_of_two(recipe, rank, port, run, how=""):
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-c", SLOW, how, str(recipe), f"run={run}"]
    environment = {**ENVIRONMENT, **places, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_while_a_rank_waits_for_others_ends_it_and_the_run_is_stopped(recipe, number, code):
    """The process group's wait is native code, which knows nothing of signals."""
    run = recipe.parent / f"alone {number}"
    name = signal.Signals(number).name
    with started(recipe, 0, 30000 + os.getpid() % 20000, run, by=rank_of_two) as process:
        wait_until(process, (run / "status.json").exists)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, stopped_by(name))
    told_by = {key: status(run)[key] for key in ("outcome", "message", "step", "checkpoint")}
    assert told_by == {"outcome": "stopped", "message": f"asked by {name}", "step": 0, "checkpoint": None}
    (event,) = (json.loads(line) for line in (run / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["asked_by"]) == ("stop", name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_rank_that_is_interrupted_stops_the_others_and_one_that_is_killed_fails_the_run(recipe, number):
    """Also where a launcher sends SIGTERM to those that are left."""
    run, port = recipe.parent / f"pair {number}", 30000 + os.getpid() % 20000
    with (
        started(recipe, 0, port, run, "slow", by=rank_of_two) as first,
        started(recipe, 1, port, run, "slow", by=rank_of_two) as second,
    ):
        for process in (first, second):
            wait_for_line(process, "loading")
        second.send_signal(number)
        second.wait(timeout=60)
        if number == signal.SIGKILL:
            first.send_signal(signal.SIGTERM)
        output, _ = first.communicate(timeout=60)
    if number == signal.SIGINT:
        assert (first.returncode, second.returncode) == (75, 130), output
        assert output == stopped_by("SIGINT")
        assert (status(run)["outcome"], status(run)["message"]) == ("stopped", "asked by SIGINT")
    else:
        assert first.returncode == 1, output
        message = f"rank 1 (process {second.pid}) ended"
        assert (status(run)["outcome"], status(run)["message"], status(run)["rank"]) == ("failed", message, 1)


def test_what_asked_an_earlier_run_is_removed_and_a_step_to_come_is_kept(recipe):
    run = recipe.parent / "asked"
    run.mkdir()
    (run / "STOP").touch()
    (run / "SAVE").write_text("3")
    for name in ("STOP", "SAVE"):
        os.utime(run / name, (0, 0))
    code, output = train(recipe, f"run={run}", "schedule.steps=4", "checkpoint.every_steps=100")
    assert code == 0, output[-3000:]
    assert f"{run}/STOP was there before this start, asked an earlier run and is removed; write it anew" in output
    assert f"{run}/SAVE was there before this start: obeyed after step 3" in output
    assert [step_of(folder) for folder in finished(run)] == [3, 4]
    assert not (run / "STOP").exists()
