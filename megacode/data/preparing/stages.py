"""The stages of de-duplication and decontamination, and how they run on this machine: datatrove's local executor.

A task that is done leaves a marker in PREFIX.parts/stages/STAGE/completions, so that a job started again goes on where
it was. datatrove is imported when there is work for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megacode.errors import UserError

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

    from megacode.data.preparing.job import Job

NEEDED = ("datatrove", "regex", "xxhash")
EXACT, NEAR = "exact", "near"
BENCHMARKS = "benchmarks.npz"
FEW_UNITS = 64
"""Equal signatures of so few units are found faster than a job starts."""
OnStage = Callable[[str, int, int], None]
"""Told the name of a stage, how many of its tasks are done, and how many there are."""


@dataclass(frozen=True)
class Stage:
    """Steps that run one after the other, `tasks` times; on a cluster `together` tasks in one place, in turn."""

    name: str
    steps: list[PipelineStep]
    tasks: int
    together: int = 1

    def folder(self, parts: Path) -> Path:
        """Where datatrove keeps its state."""
        return parts / "stages" / self.name

    def num_done(self, parts: Path) -> int:
        return sum(1 for _ in (self.folder(parts) / "completions").glob("*"))

    def missing(self, parts: Path) -> list[int]:
        """The tasks that are not done."""
        done = {path.name for path in (self.folder(parts) / "completions").glob("*")}
        return [task for task in range(self.tasks) if f"{task:05d}" not in done]


def check_installed(asked: str) -> None:
    """Raises: UserError where the extra `data` is not installed."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(
            f"{asked} needs {', '.join(absent)}; install the extra: pip install -c constraints.txt -e '.[data]'"
        )


def stages_of(job: Job) -> list[Stage]:
    """What is done before a job's documents are tokenized; nothing where nothing is to be left out."""
    if job.dedup is None and not job.benchmarks:
        return []
    from megacode.data.preparing import dedup as steps

    parts = job.folder
    reading: list[PipelineStep] = [steps.Documents(parts)]
    if job.benchmarks:
        reading.append(steps.Decontaminate(parts))
    if job.dedup is None:
        return [Stage("decontaminate", reading, job.num_units)]
    near = job.dedup == NEAR
    num_buckets = steps.config(near).num_buckets
    return [
        Stage("sign", [*reading, steps.Signature(parts, near)], job.num_units),
        Stage("search", [steps.Buckets(parts, near)], num_buckets, num_buckets if job.num_units < FEW_UNITS else 1),
        Stage("cluster", [steps.Cluster(parts)], 1),
    ]


def run_local(stages: list[Stage], parts: Path, workers: int, on_stage: OnStage) -> None:
    """Run stages in order, each in `workers` processes.

    Args:
        stages: From `stages_of`.
        parts: PREFIX.parts.
        workers: Processes.
        on_stage: Told twice a second.

    Raises:
        UserError: an input is not as it should be, or a task failed: which one and where its log is.
    """
    undone = [stage for stage in stages if stage.missing(parts)]
    if not undone:
        return
    from megacode.data.preparing.local import LocalExecutor, pool

    with pool(min(workers, max(len(stage.missing(parts)) for stage in undone))) as processes:
        for stage in undone:
            with _watched(stage, parts, on_stage):
                LocalExecutor(stage.name, stage.steps, stage.tasks, stage.folder(parts)).run_in(processes)


@contextlib.contextmanager
def _watched(stage: Stage, parts: Path, on_stage: OnStage) -> Iterator[None]:
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            on_stage(stage.name, stage.num_done(parts), stage.tasks)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    on_stage(stage.name, stage.tasks, stage.tasks)
