"""What becomes of a SLURM job when its run ends."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from megacode.errors import UserError
from megacode.submit.restarts import AGAIN, FINISHED, GIVEN_UP, STOPPED, Ending, begin, decide, end, newest_step

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
        ({"step": 10}, GIVEN_UP, "no step was gained since step 10; ask for more time"),
        ({"restarts": 5}, GIVEN_UP, "it was 5 times already"),
        ({"state": "COMPLETING"}, STOPPED, "SLURM calls the job COMPLETING"),
        ({"state": "COMPLETING", "step": 10, "restarts": 5}, STOPPED, "starts it again or not"),  # a node was lost
        ({"state": "COMPLETING", "status": {"outcome": "finished"}}, FINISHED, "finished"),
        ({"state": ""}, STOPPED, "SLURM calls the job unknown"),
        ({"asked": False, "status": {"outcome": "failed", "message": "rank 1"}}, AGAIN, r"failed \(rank 1\); it"),
        ({"asked": False, "status": {"outcome": "failed", "message": "no"}, "step": 10}, GIVEN_UP, "since step 10$"),
        ({"asked": False, "status": {"outcome": "running"}}, AGAIN, "ended without a word"),
        ({"asked": False, "status": None, "step": 10}, GIVEN_UP, "before it could say anything; not started again"),
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
    assert begin(tmp_path, "7", 0, 3) == tmp_path / "logs" / "job_7_0"
    code, reason = end(tmp_path, "7", 0, 3, "RUNNING", asked=False)
    assert (code, reason.split(";")[0]) == (GIVEN_UP, "the run ended before it could say anything")
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


def test_the_command_of_the_batch_script(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    sections = "model: {preset: nano}\ntokenizer: {path: t}\ndata: {train: d}\nschedule: {steps: 9, warmup_steps: 1}\n"
    sections += "batch: {global_samples: 1, micro_samples: 1, sequence_length: 8}\noptimizer: {learning_rate: 1.0}\n"
    recipe.write_text(f"run: {tmp_path}/run\n{sections}")

    def call(*arguments):
        program = "import sys; from megacode.submit.restarts import main; code = main(sys.argv[1:]); "
        program += "assert not {'torch', 'deepspeed'} & set(sys.modules); sys.exit(code)"
        environment = {"SLURM_JOB_ID": "7", "PYTHONPATH": ":".join(sys.path)}
        command = [sys.executable, "-c", program, *arguments, "--max-restarts", "3"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    done = call("begin", str(recipe))
    assert (done.returncode, done.stdout.strip()) == (0, f"{tmp_path}/run/logs/job_7_0"), done.stderr
    checkpoint(tmp_path / "run", 3)
    tell(tmp_path / "run", "stopped", 5, "asked by SIGUSR1")
    done = call("end", str(recipe), "--asked", "--state", "RUNNING")
    assert (done.returncode, done.stdout) == (
        AGAIN,
        "the run was asked to stop and has saved; it goes on from step 3\n",
    )
    done = call("begin", str(recipe), "seeed=3")
    assert (done.returncode, done.stderr.count("error: ")) == (2, 1)
