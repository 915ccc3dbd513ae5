"""A job's stages on a SLURM cluster, through datatrove's executor: an array job for each, after the one before it.

State is files on a file system that all nodes share: what each stage did in PREFIX.parts/stages, what its tasks said
and which jobs they were in PREFIX.slurm. Nothing but sbatch, squeue, scancel and scontrol is called: no accounting is
needed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from megacode.data.preparing.job import Job
from megacode.data.preparing.local import AGAIN
from megacode.data.preparing.lock import locked
from megacode.data.preparing.parts import merge, run_unit
from megacode.data.preparing.stages import OnStage, Stage, stages_of
from megacode.errors import UserError

POLL_SECONDS = 5.0
PATIENCE = 15
"""Polls for which squeue may fail, or results may not be seen yet (network file systems), before that counts."""
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol")
_ERROR = re.compile(r"^(?:\d+: )?(?:[\w.]+\.)?(\w+(?:Error|Exception|Interrupt)): (.+)$", re.MULTILINE)
_KILLED = re.compile(r"(CANCELLED AT .*|Detected .*oom.?kill.*|oom_kill.*)", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """How tasks ask for their places; what else sbatch shall know goes through its environment (SBATCH_ACCOUNT, ...).

    Attributes:
        partition: Left out, the cluster's default.
        time: Limit of a task, as sbatch takes it; left out, the partition's default.
        memory_gb: Memory of a task.
        workers: Tasks at once; left out, as many as fit.
    """

    partition: str | None = None
    time: str | None = None
    memory_gb: int = 4
    workers: int | None = None


class Tokenize(PipelineStep):
    """Tokenizes unit `rank`."""

    type, name = "tokens", "tokenize a unit"

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = str(folder)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        run_unit(Job.load(self.folder), rank)


class Merge(PipelineStep):
    """Makes the shard of the parts, and removes PREFIX.parts."""

    type, name = "tokens", "merge"

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job  # and not its folder, which is gone when the task is run again after it has merged

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        merge(self.job)


class _Executor(SlurmPipelineExecutor):
    """datatrove's, without a job that sums up statistics after each stage, and without options that are not given.

    Tasks hold the lock of the prefix, all of a stage together, or the one that merges alone.
    """

    prefix: Path
    alone: bool

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        with locked(self.prefix, shared=not self.alone):
            return super()._run_for_rank(rank, local_rank, node_rank)

    def launch_merge_stats(self) -> None:
        pass

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        given = super().get_sbatch_args(max_array)
        return {key: value for key, value in given.items() if value or key not in ("partition", "time")}


class _NoAnswerError(UserError):
    """A command of SLURM failed, which may pass."""


@dataclass(frozen=True)
class Submission:
    """What stands in the cluster's queue for a prefix, or did.

    Attributes:
        prefix: Of the shard.
        stages: All stages, tokenizing and merging included.
        jobs: Stage -> job, of the stages that were not done when the jobs were sent.
    """

    prefix: Path
    stages: list[Stage]
    jobs: dict[str, str]

    def queued(self) -> dict[str, str]:
        """The jobs that wait or run: stage -> job. Raises: UserError where squeue fails."""
        present = set(_call("squeue", "--noheader", f"--user={os.getuid()}", "--format=%F").split())
        return {stage: job for stage, job in self.jobs.items() if job in present}

    def wait(self, finished: Callable[[], bool], on_stage: OnStage) -> None:
        """Wait for the end.

        Args:
            finished: Whether the shard is there.
            on_stage: Told at each poll.

        Raises:
            UserError: a task failed (which one, why, and where its log is), or squeue does again and again.
        """
        lost = 0
        while not finished():
            try:
                queued = self.queued()
            except _NoAnswerError as error:
                lost += 1
                if lost > PATIENCE:
                    raise UserError(f"{error}; the jobs go on: wait again to see how far they are") from None
            else:
                self._tell(queued, on_stage)
                # A job of a failed stage takes those after it along, so an empty queue is the end, good or bad.
                lost = 0 if queued else lost + 1
                if lost and not finished() and (lost > PATIENCE or any(map(_reason, self._logs()))):
                    raise UserError(self._failure())
            time.sleep(POLL_SECONDS)

    def cancel(self) -> None:
        """Take what waits or runs off the queue."""
        for job in self.queued().values():
            _call("scancel", job)

    def _tell(self, queued: dict[str, str], on_stage: OnStage) -> None:
        """Stages before the first one in the queue are done: else that one would not be there."""
        for stage in self.stages if queued else ():
            if stage.name in queued:
                on_stage(stage.name, stage.num_done(_parts(self.prefix)), stage.tasks)
                return
            on_stage(stage.name, stage.tasks, stage.tasks)

    def _logs(self) -> list[Path]:
        folder = _outputs(self.prefix)
        return [log for stage, job in self.jobs.items() for log in sorted((folder / stage).glob(f"{job}_*.out"))]

    def _failure(self) -> str:
        for log in self._logs():
            if reason := _reason(log):
                task = log.stem.rpartition("_")[2]
                return f"the stage {log.parent.name} failed in array task {task}: {reason}; its log is {log}; {AGAIN}"
        stage = next((stage for stage in self.stages if stage.missing(_parts(self.prefix))), self.stages[-1])
        missing = stage.missing(_parts(self.prefix))
        return (
            f"no job is left in the queue, and {len(missing)} of {stage.tasks} tasks of the stage {stage.name} (the "
            f"first is {missing[0] if missing else '-'}) are not done; logs are in {_outputs(self.prefix)}; {AGAIN}"
        )


def check() -> None:
    """Raises: UserError where nothing can be sent to a cluster from."""
    absent = [command for command in COMMANDS if shutil.which(command) is None]
    if absent:
        raise UserError(f"--executor slurm needs {', '.join(absent)} on PATH; start it where SLURM is, or leave it out")
    if "SLURM_JOB_ID" in os.environ:
        raise UserError("--executor slurm sends jobs, which a job must not; start it outside of any, or leave it out")


def submit(job: Job, request: Request) -> Submission:
    """Send all stages of a job to the cluster; unless they stand in its queue.

    Args:
        job: A job in PREFIX.parts.
        request: What to ask for.

    Raises:
        UserError: SLURM is not here or refuses the jobs, or this is one of its jobs.
    """
    check()
    prefix = Path(job.output)
    if re.search(r"[^\w./+=@,:-]", str(prefix)):
        raise UserError(f"{prefix} has characters that a batch script cannot have; use letters, digits and _ . / -")
    own = Stage("tokenize", [Tokenize(job.folder)], job.num_units), Stage("merge", [Merge(job)], 1)
    stages = [*stages_of(job), *own]
    record = _outputs(prefix) / "jobs.json"
    if record.exists():
        earlier = Submission(prefix, stages, json.loads(record.read_text(encoding="utf-8")))
        if earlier.queued():
            return earlier
    submission = Submission(prefix, stages, {})
    record.parent.mkdir(parents=True, exist_ok=True)
    try:
        _send(submission, request, record)
    except BaseException:
        submission.cancel()
        raise
    return submission


def _send(submission: Submission, request: Request, record: Path) -> None:
    """Send the stages one by one, and keep in `record` what is in the queue."""
    from datatrove.utils.logging import logger

    logger.remove()
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", _call("scontrol", "show", "config"))
    most = int(found[1]) if found else 1001
    previous = None
    for stage in submission.stages:
        previous = _executor(submission.prefix, stage, request, most, previous)
        with _complaints() as complaints:
            try:
                previous.launch_job()
            except subprocess.CalledProcessError:
                raise UserError(f"sbatch refused: {complaints()}; mend the options or SBATCH_ variables") from None
        if previous.job_id != -1:
            submission.jobs[stage.name] = str(previous.job_id).partition(";")[0]
            record.write_text(json.dumps(submission.jobs), encoding="utf-8")


def _executor(prefix: Path, stage: Stage, request: Request, most: int, depends: _Executor | None) -> _Executor:
    outputs = _outputs(prefix) / stage.name
    merges = stage.name == "merge"
    executor = _Executor(
        stage.steps,
        tasks=stage.tasks,
        # Of several arrays for a stage, the next stage would wait for the last one only. So there is one.
        tasks_per_job=max(stage.together, math.ceil(stage.tasks / most)),
        max_array_size=most,
        time=request.time or "",
        partition=request.partition or "",
        mem_per_cpu_gb=request.memory_gb,
        workers=request.workers or -1,
        job_name=f"megacode-{stage.name}",
        qos="",
        env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        sbatch_args={"kill-on-invalid-dep": "yes"},
        depends=depends,
        # Merging ends with the removal of PREFIX.parts, so its marker must be elsewhere; and it is never skipped.
        logging_dir=str(outputs if merges else stage.folder(_parts(prefix))),
        skip_completed=not merges,
        slurm_logs_folder=str(outputs),
    )
    executor.prefix, executor.alone = prefix, merges
    return executor


def _parts(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".parts")


def _outputs(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".slurm")


def _reason(log: Path) -> str | None:
    """Why a task failed, by the end of its log; None where it did not, or nothing is said."""
    with log.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 20_000, 0))
        tail = file.read().decode("utf-8", "replace")
    errors, killed = _ERROR.findall(tail), _KILLED.findall(tail)
    if errors:
        name, text = errors[-1]
        return text if name == "UserError" else f"{name}: {text}"
    return killed[-1] if killed else None


def _call(*command: str) -> str:
    """What a command of SLURM prints. Raises: UserError where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise _NoAnswerError(f"{command[0]} has not answered for a minute") from None
    if done.returncode:
        raise _NoAnswerError(f"{command[0]} fails: {' '.join(done.stderr.split())}")
    return done.stdout


@contextmanager
def _complaints() -> Iterator[Callable[[], str]]:
    """Keeps what child processes say on stderr, and gives it in one line."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            return " ".join(file.read().decode("utf-8", "replace").split())

        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
