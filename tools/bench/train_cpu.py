"""`python -m megacode.tools.bench.train_cpu`: training on the CPU, megacode and its peers side by side in one run."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any

import typer

from megacode.recipe import Recipe
from megacode.tools.bench import ours, overhead, peers
from megacode.tools.bench.contest import SHAPES, Step, check_losses, contest_recipe
from megacode.tools.bench.processes import Memory, Team, command_line, contestant
from megacode.tools.output import JsonFile, json_output

COMPARED_STEPS = 3
OVERHEAD_REPETITIONS = 10
ANSWER_SECONDS = 180.0
"""A team that answers later has hung."""


@dataclass(frozen=True)
class Contestant:
    """A row of the table."""

    name: str
    builder: Callable[[Recipe], Step]
    processes: int
    parallel: dict[str, Any] = field(default_factory=dict)
    """The recipe's section `parallel`; peers have none."""
    peer: bool = False


@dataclass(frozen=True)
class Row:
    """What was measured of a contestant."""

    shape: str
    name: str
    processes: int
    peer: bool
    tokens_per_second: tuple[float, float, float]
    """Median, lowest and highest over the steps after the warm-up."""
    memory: Memory
    losses: list[float]
    """Of the first steps."""


def contestants(processes: int) -> list[Contestant]:
    """Everyone, in the table's order: the sharded ones, and in one process with all threads the models alone."""
    zero3 = [("step", "microbatch"), ("step", "step"), ("microbatch", "microbatch")]
    return [
        Contestant("megacode, ZeRO-1", ours.engine, processes, {"zero": 1}),
        *(
            Contestant(
                f"megacode, ZeRO-3, gather {gather}, reduce {reduce}", ours.engine, processes,
                {"zero": 3, "gather": gather, "reduce": reduce},
            )
            for gather, reduce in zero3
        ),
        Contestant("transformers, DeepSpeed ZeRO-3", peers.deepspeed_zero3, processes, peer=True),
        Contestant("transformers, FSDP2", peers.fsdp2, processes, peer=True),
        Contestant("megacode, one process", ours.engine, 1, {"zero": 1}),
        Contestant("transformers, one process", peers.plain, 1, peer=True),
    ]  # fmt: skip


def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"{', '.join(SHAPES)}; may be repeated.")] = None,
    processes: Annotated[int, typer.Option(min=2, help="Data ranks of the sharded contestants.")] = 2,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step on each of the ranks.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are measured, after one to warm up.")] = 6,
    json_file: JsonFile = None,
) -> None:
    """Train the same model on the same tokens with megacode, with DeepSpeed ZeRO-3 and with FSDP2 on CPU processes.

    All start from the same weights; losses that differ end the comparison with an error. The contestants take turns,
    one step each, so that a disturbance of the machine meets all. Prints tokens/s, peak memory and what the schedule
    and the engine cost per micro-batch.

    Example: python -m megacode.tools.bench.train_cpu --shape micro --shape mini
    """
    shapes = shape or ["micro", "mini"]
    for name in shapes:
        contest_recipe(name, micro_batches, {}, processes)
    with json_output(json_file) as write_json:
        rows = [row for name in shapes for row in compare(name, processes, micro_batches, steps)]
        _progress("overhead")
        team = Team(overhead.serve, (), 1, 1, ANSWER_SECONDS)
        costs = team.ask("overheads", OVERHEAD_REPETITIONS)[0]
        team.stop()
        write_json({"rows": [dataclasses.asdict(row) for row in rows], "overhead_ms": costs})
        print(table(rows))
        print()
        print(overhead_table(costs))


@dataclass
class Run:
    """A contestant at work."""

    contestant: Contestant
    recipe: Recipe
    team: Team
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self) -> None:
        """Its turn: one step."""
        turn = self.team.train(1)
        self.seconds.extend(turn.seconds)
        self.losses.extend(turn.losses)

    def row(self, shape: str) -> Row:
        """What was measured; the first step was the warm-up."""
        batch, one = self.recipe.batch, self.contestant
        rates = [batch.global_samples * batch.sequence_length / seconds for seconds in self.seconds[1:]]
        figures = (median(rates), min(rates), max(rates))
        memory = self.team.memory()
        return Row(shape, one.name, one.processes, one.peer, figures, memory, self.losses[:COMPARED_STEPS])


def compare(shape: str, processes: int, micro_batches: int, steps: int) -> list[Row]:
    """Train the shape with all contestants in turns.

    Raises:
        RuntimeError: a process failed, or the contestants' losses differ.
    """
    runs: list[Run] = []
    try:
        for one in contestants(processes):
            _progress(f"{shape}: starting {one.name}")
            runs.append(_start(one, shape, micro_batches * processes // one.processes))  # the same global batch
        for number in range(1 + max(steps, COMPARED_STEPS - 1)):
            _progress(f"{shape}: step {number + 1}")
            for run in runs:
                run.step()
            if number < COMPARED_STEPS:
                _check_losses(runs)
        return [run.row(shape) for run in runs]
    finally:
        for run in runs:
            run.team.stop()


def _start(one: Contestant, shape: str, micro_batches: int) -> Run:
    recipe = contest_recipe(shape, micro_batches, one.parallel, one.processes)
    threads = max(1, len(os.sched_getaffinity(0)) // one.processes)
    return Run(one, recipe, Team(contestant, (one.builder, recipe), one.processes, threads, ANSWER_SECONDS))


def _check_losses(runs: list[Run]) -> None:
    check_losses(len(runs[0].losses), {run.contestant.name: run.losses[-1] for run in runs})


def table(rows: list[Row]) -> str:
    """Markdown: a line a contestant; the ratio is to the fastest peer of the same shape and number of processes."""
    lines = [
        "| shape | contestant | processes | tokens/s, median (lowest, highest) | to the fastest peer | peak MiB a rank "
        "(before the model) | loss of step 3 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        group = [other for other in rows if (other.shape, other.processes) == (row.shape, row.processes)]
        fastest = max(other.tokens_per_second[0] for other in group if other.peer)
        middle, low, high = row.tokens_per_second
        lines.append(
            f"| {row.shape} | {row.name} | {row.processes} | {middle:,.0f} ({low:,.0f}, {high:,.0f}) | "
            f"{middle / fastest:.2f} | {row.memory.peak >> 20} ({row.memory.before >> 20}) | {row.losses[-1]:.6f} |"
        )
    return "\n".join(lines)


def overhead_table(costs: dict[str, float]) -> str:
    """Markdown: a line for the schedule alone and for each layout."""
    lines = ["| beyond the model's own forward and backward | ms per micro-batch |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {cost:.2f} |" for name, cost in costs.items())])


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line(main)
