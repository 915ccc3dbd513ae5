"""What may come between a start and its first step: another start in the folder, a signal, what lies there from before."""

import subprocess
import sys
from contextlib import contextmanager

import pytest
from support.launching import metrics, start, status, told, train, write_recipe
from support.stalling import run_ranks

from megacode.checkpoint.keep import newest, step_of
from megacode.train.lock import NAME


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("start"))


@contextmanager
def started(recipe, *overrides):
    """A run that is killed where a test fails."""
    with start(recipe, *overrides) as process:
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
