"""Waiting for jobs on a cluster that answers badly, or ends them without a word; no cluster is needed."""

import contextlib
import io

import pytest
from datatrove.pipeline.base import PipelineStep

from megacode.data.preparing import slurm
from megacode.data.preparing.lock import locked
from megacode.data.preparing.slurm import Submission
from megacode.data.preparing.stages import Stage
from megacode.errors import UserError


class Look(PipelineStep):
    """Who could work on a prefix while a task does."""

    name, type = "look", "test"

    def __init__(self, prefix):
        super().__init__()
        self.prefix, self.found = prefix, []

    def run(self, data=None, rank=0, world_size=1):
        for shared in (True, False):
            try:
                with locked(self.prefix, shared=shared):
                    self.found.append(True)
            except UserError:
                self.found.append(False)


@pytest.mark.parametrize(
    ("name", "found"), [("sign", [True, False]), ("tokenize", [True, False]), ("merge", [False] * 2)]
)
def test_a_task_keeps_other_commands_away(tmp_path, monkeypatch, name, found):
    monkeypatch.setattr(slurm._Executor, "_set_distributed_environment", lambda *args: None)  # asks SLURM
    look = Look(tmp_path / "s")
    executor = slurm._executor(tmp_path / "s", Stage(name, [look], 1), slurm.Request(), 1001, None)
    with contextlib.redirect_stderr(io.StringIO()):
        executor.pipeline[0].run()
        assert look.found == [True, True]
        look.found.clear()
        executor._run_for_rank(0)
    assert look.found == found


STAGES = [Stage("sign", [], 3), Stage("merge", [], 1)]


@pytest.fixture
def submission(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.0)
    done = tmp_path / "s.parts" / "stages" / "sign" / "completions"
    done.mkdir(parents=True)
    (done / "00001").touch()
    return Submission(tmp_path / "s", STAGES, {"sign": "7", "merge": "8"})


def answers(monkeypatch, *queues):
    """What squeue says, one after the other; the last one for ever."""
    left = list(queues)

    def call(*command):
        queue = left.pop(0) if len(left) > 1 else left[0]
        if queue is None:
            raise slurm._NoAnswerError("squeue fails: busy")
        return queue

    monkeypatch.setattr(slurm, "_call", call)


def test_a_queue_that_does_not_answer_for_a_while(submission, monkeypatch):
    answers(monkeypatch, "7\n8\n", None, None, "8\n6\n", "6\n")
    told, left = [], iter([False] * 6)
    submission.wait(lambda: next(left, True), lambda *stage: told.append(stage))
    assert told == [("sign", 1, 3), ("sign", 3, 3), ("merge", 0, 1)]


def test_a_queue_that_does_not_answer_at_all(submission, monkeypatch):
    answers(monkeypatch, None)
    with pytest.raises(UserError, match="squeue fails: busy; the jobs go on: wait again"):
        submission.wait(lambda: False, lambda *stage: None)


def test_jobs_that_are_gone_without_a_word(submission, monkeypatch):
    answers(monkeypatch, "7\n8\n", "")
    with pytest.raises(UserError, match=r"2 of 3 tasks of the stage sign \(the first is 0\) are not done; logs are in"):
        submission.wait(lambda: False, lambda *stage: None)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "0: megacode.errors.UserError: a.gz is damaged; fetch it again\nsrun: error: n1: task 0",
            "a.gz is damaged; .*",
        ),
        ("Traceback\n0: ValueError: first\n0: numpy.exceptions.AxisError: second\n", "AxisError: second"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-25T22:00 DUE TO TIME LIMIT ***", ".*TIME LIMIT.*"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0", ".*oom_kill.*"),
    ],
)
def test_why_a_task_failed(submission, monkeypatch, log, reason):
    outputs = submission.prefix.with_name("s.slurm") / "sign"
    outputs.mkdir(parents=True)
    (outputs / "7_0.out").write_text("2026-11-25 | INFO | fine\n")
    (outputs / "7_2.out").write_text(log)
    answers(monkeypatch, "")
    with pytest.raises(
        UserError, match=rf"the stage sign failed in array task 2: {reason}; its log is .*7_2\.out; mend"
    ):
        submission.wait(lambda: False, lambda *stage: None)
