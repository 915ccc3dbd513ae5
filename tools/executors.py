"""Where `megacode prepare` works: on this machine, or on a SLURM cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import typer

from megacode.data.preparing.stages import BENCHMARKS, EXACT, NEAR, OnStage, check_installed
from megacode.errors import UserError

if TYPE_CHECKING:
    from megacode.data.preparing.job import Job
    from megacode.data.preparing.prepare import Summary
    from megacode.data.preparing.streams import OnBytes

DEFAULT_MEMORY_GB = 4


class Executor(StrEnum):
    """Who runs the work."""

    LOCAL = "local"
    SLURM = "slurm"


class Duplicates(StrEnum):
    """Which are left out."""

    EXACT = EXACT
    NEAR = NEAR


def check_executor(executor: Executor, slurm_options: Mapping[str, object]) -> None:
    """Before anything else is done.

    Raises:
        UserError: options of SLURM without it, or no jobs can be sent from here.
    """
    given = [name for name, value in slurm_options.items() if value]
    if executor == Executor.LOCAL and given:
        raise UserError(f"{given[0]} needs --executor slurm; leave it out, or send the work to a cluster")
    if executor == Executor.SLURM:
        check_installed("--executor slurm")
        from megacode.data.preparing.slurm import check

        check()


def tell_skipped(job: Job) -> None:
    """Say how many problems of benchmarks are not looked for."""
    from megacode.data.preparing.decontaminate import SHORTEST, Index

    if num := Index.load(job.folder / BENCHMARKS).num_skipped:
        typer.echo(f"{num:,} problems of benchmarks are not looked for: under {SHORTEST} words, or numbers and imports")


def on_this_machine(job: Job, workers: int | None) -> Summary:
    """Run a job with progress bars."""
    from megacode.data.preparing.prepare import prepare

    try:
        with _bars(job.num_bytes) as (on_bytes, on_stage):
            return prepare(job, workers, on_bytes, on_stage)
    except KeyboardInterrupt:
        num_done = sum(job.part(unit).exists() for unit in range(job.num_units))
        typer.echo(
            f"interrupted: {num_done:,} of {job.num_units:,} parts are done, in {job.folder}; the same command given "
            "again goes on from them",
            err=True,
        )
        raise typer.Exit(130) from None


def on_cluster(
    job: Job, partition: str | None, time: str | None, memory_gb: int | None, workers: int | None, wait: bool
) -> Summary | None:
    """Send a job to SLURM, where it is not yet, and say how to see how far it is, or wait for its end.

    Returns:
        What is in each PREFIX.json; None where nobody waited.

    Raises:
        UserError: SLURM refuses the jobs, or one failed.
    """
    from megacode.data.preparing.slurm import Request, submit

    if (summary := job.finished()) is not None:
        return summary
    request = Request(partition, time, memory_gb or DEFAULT_MEMORY_GB, workers)
    submission = submit(job, request)
    for stage in submission.stages:
        if stage.name in submission.jobs:
            done = f", {stage.num_done(job.folder):,} done" if stage.num_done(job.folder) else ""
            typer.echo(f"job {submission.jobs[stage.name]}: {stage.name}, {stage.tasks:,} tasks{done}")
    if not wait:
        typer.echo(f"squeue --me shows the jobs, {job.output}.slurm has their logs; --wait waits for the end")
        return None
    with _bars(job.num_bytes) as (_, on_stage):
        submission.wait(lambda: job.finished() is not None, on_stage)
    return job.finished()


@contextmanager
def _bars(num_bytes: int) -> Iterator[tuple[OnBytes, OnStage]]:
    """Progress bars: bytes that are tokenized, and tasks of stages; nothing where stdout is no terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        bars: dict[str, Any] = {}

        def on_stage(name: str, done: int, tasks: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name.capitalize(), total=tasks)
            progress.update(bars[name], completed=done)

        def on_bytes(count: int) -> None:
            if "" not in bars:
                bars[""] = progress.add_task("Tokenize", total=num_bytes)
            progress.advance(bars[""], count)

        yield on_bytes, on_stage
