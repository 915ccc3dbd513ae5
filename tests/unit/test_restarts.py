"""What becomes of a SLURM job when its run ends."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from megacode.errors import UserError
from megacode.submit.restarts import (
    AGAIN,
    FINISHED,
    GIVEN_UP,
    STOPPED,
    Ending,
    begin,
    decide,
    end,
    newest_step,
    read_lines,
)

SAVED = Ending(
    first_step=10, step=14, status={"outcome": "stopped", "step": 14, "message": "asked by SIGUSR1"}, asked=True,
    restarts=2, max_restarts=5, state="RUNNING",
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({}, AGAIN, "it goes on from step 14"),
        ({"status": {"outcome": "finished", "step": 20}}, FINISHED, "finished at step 20"),
        ({"asked": False}, STOPPED, r"was stopped at step 14 \(asked by SIGUSR1\); submit it again to go on"),
        ({"asked": False, "status": {"outcome": "stopped", "message": "asked by SIGTERM"}}, AGAIN, "from step 14"),
        ({"status": {"outcome": "stopped", "step": 14, "message": "asked by the file r/STOP"}}, STOPPED, "file r/STOP"),
        ({"step": 10, "starts": 2}, AGAIN, "from step 10"),
        ({"step": 10, "starts": 3}, GIVEN_UP, "no step was gained since step 10, in 3 starts; ask for more time"),
        ({"restarts": 5}, GIVEN_UP, "it was 5 times already"),
        ({"state": "COMPLETING"}, STOPPED, "SLURM calls the job COMPLETING"),
        ({"state": ""}, AGAIN, "from step 14"),
        ({"state": "COMPLETING", "step": 10, "starts": 3}, STOPPED, "SLURM calls the job COMPLETING"),
        ({"state": "COMPLETING", "status": {"outcome": "finished"}}, FINISHED, "finished"),
        ({"asked": False, "status": {"outcome": "failed", "message": "rank 1"}}, AGAIN, r"failed \(rank 1\); it"),
        ({"asked": False, "status": {"outcome": "failed", "message": "no"}, "step": 10}, AGAIN, "from step 10"),
        ({"asked": False, "status": {"outcome": "running"}}, AGAIN, "ended without a word"),
        ({"asked": False, "status": None, "step": 10, "starts": 3}, GIVEN_UP, "no step was gained .* 3 starts$"),
    ],
)  # fmt: skip
def test_what_a_run_has_left_decides(changes, code, reason):
    told, text = decide(dataclasses.replace(SAVED, **changes))
    assert told == code
    assert re.search(reason, text)


def checkpoint(run, step):
    (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


def tell(run, outcome, time, message=""):
    status = {"outcome": outcome, "message": message, "step": 1, "unix_time": time, "host": "a", "pid": 1}
    (run / "status.json").write_text(json.dumps(status))


def test_a_status_of_an_earlier_start_does_not_count(tmp_path):
    tell(tmp_path, "finished", time=1)
    assert begin(tmp_path, "7", 0, 3) == tmp_path / "log" / "job_7_0"
    code, reason = end(tmp_path, "7", 0, 3, "RUNNING", asked=False)
    assert (code, reason.split(";")[0]) == (AGAIN, "the run ended before it could say anything")
    begin(tmp_path, "7", 1, 3)
    tell(tmp_path, "finished", time=2)
    assert end(tmp_path, "7", 1, 3, "RUNNING", asked=False)[0] == FINISHED


def test_only_finished_checkpoints_count(tmp_path):
    assert newest_step(tmp_path) == 0
    checkpoint(tmp_path, 5)
    (tmp_path / "checkpoints" / "step_00000009.partial").mkdir()
    assert newest_step(tmp_path) == 5


def test_starts_that_slurm_makes_are_limited_too(tmp_path):
    for restarts in range(3):
        begin(tmp_path, "7", restarts, 10)
    with pytest.raises(UserError, match="began 3 times at step 0 and gained none"):
        begin(tmp_path, "7", 3, 10)
    begin(tmp_path, "8", 0, 10)  # another job may try
    checkpoint(tmp_path, 4)
    begin(tmp_path, "7", 3, 10)
    with pytest.raises(UserError, match="started again 11 times, more than --max-restarts 10"):
        begin(tmp_path, "7", 11, 10)


def test_what_fails_twice_in_the_same_words_is_given_up(tmp_path):
    def start(restarts, message, step):
        begin(tmp_path, "7", restarts, 10)
        tell(tmp_path, "failed", restarts + 1, message)
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
        return end(tmp_path, "7", restarts, 10, "RUNNING", asked=False)

    assert start(0, "a node is lost", 5)[0] == AGAIN, "it has gained 5 steps"
    assert start(1, "a node is lost", 5)[0] == AGAIN, "it is the first to gain none"
    assert start(2, "disk full", 5)[0] == AGAIN
    (code, reason), steps = start(3, "disk full", 5), newest_step(tmp_path)
    assert (code, steps) == (GIVEN_UP, 5)
    assert reason.startswith("the run failed (disk full); not started again: no step was gained since step 5")


def test_torn_lines_are_passed_over(tmp_path):
    file = tmp_path / "slurm" / "starts.jsonl"
    begin(tmp_path, "7", 0, 3)
    for text in ('{"unix_time": 1', '{"unix_time": "\xe4'):
        with file.open("a", encoding="latin-1") as output:
            output.write(text)
        begin(tmp_path, "7", 1, 3)
        end(tmp_path, "7", 1, 3, "RUNNING", asked=False)
    assert [line["event"] for line in read_lines(file)] == ["begin", "begin", "end", "begin", "end"]
    assert len(file.read_text(encoding="latin-1").splitlines()) == 7


def test_a_run_folder_is_of_one_job(tmp_path):
    begin(tmp_path, "6", 0, 3)
    begin(tmp_path, "7", 0, 3, queued=["7", "8"])
    begin(tmp_path, "7", 1, 3, queued=["7", "8"])
    with pytest.raises(UserError, match=r"run: the job 6 of .* waits or runs still; wait for it, or scancel 6"):
        begin(tmp_path, "7", 2, 3, queued=["6", "7"])


def test_the_command_of_the_batch_script(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    sections = "model: {preset: nano}\ntokenizer: {path: t}\ndata: {train: d}\nschedule: {steps: 9, warmup_steps: 1}\n"
    sections += "batch: {global_samples: 1, micro_samples: 1, sequence_length: 8}\noptimizer: {learning_rate: 1.0}\n"
    recipe.write_text(f"run: {tmp_path}/run\n{sections}")

    def call(*arguments, **more):
        program = "import sys; from megacode.submit.restarts import main; code = main(sys.argv[1:]); "
        program += "assert not {'torch', 'deepspeed'} & set(sys.modules); sys.exit(code)"
        environment = {"SLURM_JOB_ID": "7", "PYTHONPATH": ":".join(sys.path), **more}
        command = [sys.executable, "-c", program, *arguments, "--max-restarts", "3"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    done = call("begin", str(recipe))
    assert (done.returncode, done.stdout.strip()) == (0, f"{tmp_path}/run/log/job_7_0"), done.stderr
    checkpoint(tmp_path / "run", 3)
    tell(tmp_path / "run", "stopped", 5, "asked by SIGUSR1")
    done = call("end", str(recipe), "--asked", "--state", "RUNNING")
    assert (done.returncode, done.stdout) == (
        AGAIN,
        "the run was asked to stop; it goes on from step 3\n",
    )
    done = call("begin", str(recipe), "seeed=3")
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)
    done = call("begin", "--queued", "6 7\n8", str(recipe), SLURM_JOB_ID="9")
    assert (done.returncode, "error: run: the job 7 of " in done.stderr) == (2, True)
    done = call("begin", str(recipe), SLURM_ARRAY_JOB_ID="7")
    assert (done.returncode, "error: an array of jobs would train" in done.stderr) == (2, True)
