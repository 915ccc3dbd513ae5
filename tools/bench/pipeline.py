"""`python -m megacode.tools.bench.pipeline`: the executor's efficiency beside the bubble formula."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer

from megacode.parallel.timeline import bubble_formula
from megacode.tools.bench.processes import Figures, Span, Team, command_line, figures_of, step_seconds
from megacode.tools.output import JsonFile, json_output

SEQUENCE, HIDDEN = 256, 1024
"""Of a hidden state between stages, one sample in fp32: 1 MiB."""
BACKWARD = 2.0
"""Time of a backward, in forwards."""
MICRO_BATCHES = (4, 8, 16)
VIRTUAL_STAGES = (1, 2)
ANSWER_SECONDS = 180.0


@dataclass(frozen=True)
class Case:
    """A pipeline and its step."""

    pipeline: int
    virtual_stages: int
    num_micro_batches: int

    @property
    def ideal(self) -> float:
        """Busy share of a step by the formula."""
        return 1 - bubble_formula(self.pipeline, self.num_micro_batches, self.virtual_stages)


@dataclass(frozen=True)
class Row:
    """What was measured of a case."""

    case: Case
    ideal: float
    measured: Figures
    """Over the steps: the time that a rank's sleeps ask for, over the step's."""


def cases_of(pipeline: int) -> list[Case]:
    """The steps that are measured on so many ranks; interleaved ones where the schedule allows them."""
    return [
        Case(pipeline, virtual, count)
        for virtual in VIRTUAL_STAGES
        for count in MICRO_BATCHES
        if virtual == 1 or count % pipeline == 0
    ]


def busy_seconds(case: Case, forward_seconds: float) -> float:
    """What a rank computes in a step; its chunks together take a micro-batch `forward_seconds` forward."""
    return case.num_micro_batches * forward_seconds * (1 + BACKWARD)


def stand_in(case: Case, forward_seconds: float) -> Callable[[], Span]:
    """A step of the real `Pipeline` over the real process group, whose forwards and backwards sleep. Collective."""
    import torch
    import torch.distributed as dist
    from torch import Tensor

    from megacode.parallel.mesh import build_mesh
    from megacode.parallel.pipeline import MicroBatch, Pipeline

    mesh = build_mesh(case.pipeline, 1, 1)
    runner = Pipeline(mesh, case.virtual_stages, HIDDEN, torch.float32, torch.device("cpu"))
    ids = torch.zeros(1, SEQUENCE, dtype=torch.int64)
    batches = [MicroBatch(ids, ids, ids, None) for _ in range(case.num_micro_batches)]
    weight = torch.ones(1, SEQUENCE, HIDDEN, requires_grad=True)
    chunk_seconds = forward_seconds / case.virtual_stages

    def forward(chunk: int, x: Tensor, batch: MicroBatch, last: bool) -> Tensor:
        time.sleep(chunk_seconds)
        y = weight if x is batch.tokens else x
        return y[..., 0] * 1 if last else y * 1

    def backward(scalar: Tensor, last: bool) -> None:
        time.sleep(chunk_seconds * BACKWARD)
        scalar.backward()

    def step() -> Span:
        dist.barrier()
        begun = time.perf_counter()
        runner.train(batches, 1.0, forward, backward)
        return begun, time.perf_counter()

    return step


def serve(cases: list[Case], forward_seconds: float) -> Callable[[str, int], Span]:
    """What a rank answers: when it began and ended a step of the number-th case."""
    steps = [stand_in(case, forward_seconds) for case in cases]
    return lambda request, number: steps[number]()


def measure(pipeline: int, forward_seconds: float, steps: int) -> list[Row]:
    """A row a case. Cases take turns, so that a disturbance of the machine meets all; the first round is a warm-up."""
    cases = cases_of(pipeline)
    shares: list[list[float]] = [[] for _ in cases]
    team = Team(serve, (cases, forward_seconds), pipeline, 1, ANSWER_SECONDS)
    try:
        for _ in range(1 + steps):
            for number, case in enumerate(cases):
                seconds = step_seconds(team.ask("step", number))
                shares[number].append(busy_seconds(case, forward_seconds) / seconds)
    finally:
        team.stop()
    return [Row(case, case.ideal, figures_of(share)) for case, share in zip(cases, shares, strict=True)]


def table(rows: list[Row]) -> str:
    """Markdown: a line a case."""
    lines = [
        "| ranks | chunks a rank | micro-batches | ideal | measured, median (lowest, highest) | of the ideal |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        case, (middle, low, high) = row.case, row.measured
        lines.append(
            f"| {case.pipeline} | {case.virtual_stages} | {case.num_micro_batches} | {row.ideal:.1%} | "
            f"{middle:.1%} ({low:.1%}, {high:.1%}) | {middle / row.ideal:.3f} |"
        )
    return "\n".join(lines)


def main(
    pipeline: Annotated[
        list[int] | None, typer.Option(min=2, help="Ranks; may be repeated. Left out: 2 and 4.")
    ] = None,
    forward_ms: Annotated[float, typer.Option(min=0.1, help="Of one micro-batch on a rank; a backward: twice.")] = 20.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each case that count.")] = 10,
    json_file: JsonFile = None,
) -> None:
    """Measure the pipeline executor's efficiency on CPU processes and print it beside 1 - bubble.

    Forwards and backwards sleep, since real ones would fight over the cores; schedule, executor, autograd between
    stages and gloo's transfers are real.

    Example: python -m megacode.tools.bench.pipeline --pipeline 4 --steps 20
    """
    with json_output(json_file) as write_json:
        rows = [row for size in pipeline or [2, 4] for row in measure(size, forward_ms / 1000, steps)]
        write_json([dataclasses.asdict(row) for row in rows])
        print(table(rows))


if __name__ == "__main__":
    command_line(main)
