"""The stages of de-duplication and decontamination, and how they run on this machine: datatrove's local executor.

A task that is done leaves a marker in PREFIX.parts/stages/STAGE/completions, so that a job started again goes on where
it was. datatrove is imported when there is work for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacode.errors import UserError

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

NEEDED = ("datatrove", "regex", "xxhash")
MODES = ("exact", "near")


@dataclass(frozen=True)
class Stage:
    """Steps that run one after the other, `tasks` times."""

    name: str
    steps: list[PipelineStep]
    tasks: int

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


def dedup_stages(parts: str | Path, num_units: int, dedup: str | None, decontaminate: bool) -> list[Stage]:
    """What is done before documents are tokenized.

    Args:
        parts: PREFIX.parts, with the job and, to decontaminate, benchmarks.npz.
        num_units: Units of the job.
        dedup: `exact`, `near` (which includes exact), or None.
        decontaminate: Whether documents that hold benchmarks are dropped.
    """
    from megacode.data import dedup as steps

    assert dedup in (None, *MODES)
    parts = Path(parts).absolute()
    near = dedup == "near"
    reading: list[PipelineStep] = [steps.Documents(parts)]
    if decontaminate:
        reading.append(steps.Decontaminate(parts))
    if dedup is None:
        return [Stage("decontaminate", reading, num_units)] if decontaminate else []
    return [
        Stage("sign", [*reading, steps.Signature(parts, near)], num_units),
        Stage("search", [steps.Buckets(parts, near)], steps.config(near).num_buckets),
        Stage("cluster", [steps.Cluster(parts)], 1),
    ]


def run_local(
    stages: list[Stage], parts: str | Path, workers: int, on_progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Run stages in order, each in `workers` processes.

    Args:
        stages: From `dedup_stages`.
        parts: PREFIX.parts.
        workers: Processes.
        on_progress: Told a stage, how many of its tasks are done, and how many there are, now and then.

    Raises:
        UserError: an input is not as it should be, or a task failed: which one and where its log is.
    """
    parts = Path(parts).absolute()
    for stage in stages:
        if stage.missing(parts):
            with _watched(stage, parts, on_progress):
                _run(stage, parts, min(workers, stage.tasks))


def _run(stage: Stage, parts: Path, workers: int) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.utils.logging import logger

    class Quiet(LocalPipelineExecutor):
        """Its tasks log to files only, and say who they are when they fail."""

        def _launch_run_for_rank(self, rank: int, *args: Any, **options: Any) -> Any:
            with contextlib.redirect_stderr(io.StringIO()):
                try:
                    return super()._launch_run_for_rank(rank, *args, **options)
                except UserError:
                    raise
                except Exception as error:
                    log = stage.folder(parts) / "logs" / f"task_{rank:05d}.log"
                    raise UserError(
                        f"task {rank} of {stage.tasks} of the stage {stage.name} failed ({type(error).__name__}: "
                        f"{error}); its log is {log}; what is done stays, so start the same command again"
                    ) from error

    logger.remove()
    Quiet(stage.steps, tasks=stage.tasks, workers=workers, logging_dir=str(stage.folder(parts))).run()


@contextlib.contextmanager
def _watched(stage: Stage, parts: Path, on_progress: Callable[[str, int, int], None] | None) -> Iterator[None]:
    if on_progress is None:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            on_progress(stage.name, stage.num_done(parts), stage.tasks)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    on_progress(stage.name, stage.tasks, stage.tasks)
