"""`python -m megacode.tools.bench.scaling`: a training step shared by more processes, with sleeps for its compute."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Annotated, Any

import typer

from megacode.errors import UserError
from megacode.recipe import Recipe
from megacode.tools.bench.busy import KERNELS, Kernel, make_busy
from megacode.tools.bench.contest import check_losses, contest_recipe, layout_words, step_batches
from megacode.tools.bench.ours import mesh_of, micro_batch, start_engine
from megacode.tools.bench.processes import Figures, Span, Team, command_line, figures_of, step_seconds
from megacode.tools.output import JsonFile, json_output

SAMPLES = 16
"""Of a step, over all processes."""
MICRO_BATCHES = 2
"""Of a step on each data rank; the fewer data ranks, the more samples in each."""
BACKWARD = 2.0
"""Time of a backward, in forwards."""
ANSWER_SECONDS = 180.0


@dataclass(frozen=True)
class Case:
    """A layout."""

    processes: int
    parallel: dict[str, Any]
    """The recipe's section `parallel`; what it leaves of the processes are data ranks."""

    @property
    def model_ranks(self) -> int:
        """Processes that share a micro-batch."""
        return int(self.parallel.get("tensor", 1) * self.parallel.get("context", 1))

    @property
    def recipe(self) -> Recipe:
        """A model so small that its sleeps are nearly all of a step."""
        data = self.processes // self.model_ranks
        return contest_recipe("atom", MICRO_BATCHES, self.parallel, data, SAMPLES // MICRO_BATCHES // data)

    @property
    def layout(self) -> str:
        """For the table."""
        data = self.processes // self.model_ranks
        parts = {"data": data} if data > 1 else {}
        return layout_words({**parts, **{k: v for k, v in self.parallel.items() if k != "zero"}}) or "one process"


@dataclass(frozen=True)
class Answer:
    """A rank's step."""

    span: Span
    communication: float
    """Seconds in which it stood in exchanges."""
    core_seconds: float
    loss: float
    """Its part of the mean loss."""


@dataclass(frozen=True)
class Row:
    """What was measured of a case; seconds of a step."""

    processes: int
    layout: str
    zero: int
    seconds: Figures
    speed_up: float
    """Over one process of the same ZeRO stage."""
    efficiency: float
    asleep: float
    """What a rank's sleeps ask for."""
    communication: float
    """In which a rank stood in exchanges, mean over the ranks."""
    bare_seconds: float
    """Without sleeps."""
    bare_core_seconds: float
    """Of all ranks together, without sleeps."""


def cases_of(processes: int) -> list[Case]:
    """The layouts of so many processes."""
    sections: list[dict[str, Any]] = [{"zero": 1}, {"zero": 3}]
    if processes > 1:
        sections += [{"tensor": processes, "zero": 1}, {"tensor": processes, "sequence": True, "zero": 1}]
        sections += [{"context": processes, "zero": zero} for zero in (1, 3)]
    if processes == 8:
        sections.append({"tensor": 2, "sequence": True, "context": 2, "zero": 3})
    return [Case(processes, section) for section in sections]


def contestant(case: Case, block_seconds: float) -> Callable[[str], Answer]:
    """Trains a further step, with sleeps if asked for "busy". Collective, as what it returns is."""
    import torch
    import torch.distributed as dist

    from megacode.parallel.context import own_part
    from megacode.parallel.phases import record, stop_recording

    recipe, kernel = case.recipe, Kernel()
    mesh = mesh_of(recipe)
    zero = start_engine(recipe, mesh)
    make_busy(zero, kernel)
    kernel_seconds = block_seconds * recipe.batch.micro_samples / case.model_ranks / KERNELS
    num_labels, done = recipe.batch.global_samples * recipe.batch.sequence_length, 0

    def step(request: str) -> Answer:
        nonlocal done
        whole = [micro_batch(*batch) for batch in step_batches(recipe, done, mesh.data_rank, mesh.data)]
        batches = [own_part(batch, mesh.context, mesh.context_rank) for batch in whole]
        done += 1
        kernel.seconds = kernel_seconds if request == "busy" else 0.0
        dist.barrier()
        recorder, cores, begun = record(torch.device("cpu")), time.process_time(), time.perf_counter()
        total = zero.train_step(batches, mesh.zero_size / num_labels)
        zero.update(recipe.optimizer.learning_rate)
        ended, cores, phases = time.perf_counter(), time.process_time() - cores, recorder.take()
        stop_recording()
        return Answer((begun, ended), phases["communication"], cores, float(total.sum()) / mesh.tensor / num_labels)

    return step


def serve(cases: list[Case], block_seconds: float) -> Callable[[str, int], Answer]:
    """What a rank answers: its next step of the number-th case."""
    steps = [contestant(case, block_seconds) for case in cases]
    return lambda request, number: steps[number](request)


@dataclass
class Run:
    """A case at work."""

    case: Case
    team: Team
    number: int
    """Of the case within its team."""
    answers: dict[str, list[list[Answer]]] = field(default_factory=lambda: {"busy": [], "bare": []})
    """Request -> of each step, those of all ranks."""

    def step(self, request: str) -> float:
        """Its turn; returns the step's loss."""
        answers = self.team.ask(request, self.number)
        self.answers[request].append(answers)
        return sum(answer.loss for answer in answers)

    def seconds(self, request: str) -> Figures:
        """Of a step; the first was the warm-up."""
        return figures_of([step_seconds(answer.span for answer in answers) for answers in self.answers[request]])


def measure(processes: list[int], block_seconds: float, steps: int) -> list[Row]:
    """A row a case. Cases take turns, so that a disturbance of the machine meets all; the first round is a warm-up.

    Raises:
        RuntimeError: a process failed, or the layouts' losses differ.
    """
    runs: list[Run] = []
    try:
        for size in processes:
            cases = cases_of(size)
            team = Team(serve, (cases, block_seconds), size, 1, ANSWER_SECONDS)
            runs += [Run(case, team, number) for number, case in enumerate(cases)]
        for number in range(2 * (1 + steps)):
            losses = {}
            for run in runs:
                name = f"{run.case.processes} processes, {layout_words(run.case.parallel)}"
                losses[name] = run.step(("bare", "busy")[number % 2])
            check_losses(number + 1, losses)
    finally:
        for run in runs:
            run.team.stop()
    return rows_of(runs, block_seconds)


def rows_of(runs: list[Run], block_seconds: float) -> list[Row]:
    """What was measured."""
    alone = {run.case.parallel["zero"]: run.seconds("busy")[0] for run in runs if run.case.processes == 1}
    rows = []
    for run in runs:
        case, zero, seconds = run.case, run.case.parallel["zero"], run.seconds("busy")
        speed_up = alone[zero] / seconds[0]
        asleep = SAMPLES * case.recipe.model.layers * block_seconds * (1 + BACKWARD) / case.processes
        communication = median(mean(answer.communication for answer in ranks) for ranks in run.answers["busy"][1:])
        cores = median(sum(answer.core_seconds for answer in ranks) for ranks in run.answers["bare"][1:])
        rows.append(
            Row(
                case.processes, case.layout, zero, seconds, speed_up, speed_up / case.processes, asleep,
                communication, run.seconds("bare")[0], cores,
            )
        )  # fmt: skip
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: a line a case; the rest is what neither sleeps nor exchanges take."""
    head = [
        "processes", "layout", "ZeRO", "step, median (lowest, highest), s", "speed-up", "efficiency", "asleep, s",
        "in exchanges, s", "the rest, s", "step without sleeps, s", "its core-seconds",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        middle, low, high = row.seconds
        cells = [
            str(row.processes), row.layout, str(row.zero), f"{middle:.3f} ({low:.3f}, {high:.3f})",
            f"{row.speed_up:.2f}", f"{row.efficiency:.0%}", f"{row.asleep:.3f}", f"{row.communication:.3f}",
            f"{middle - row.asleep - row.communication:.3f}", f"{row.bare_seconds:.3f}",
            f"{row.bare_core_seconds:.3f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    processes: Annotated[
        list[int] | None, typer.Option(help="2, 4 or 8; may be repeated. Left out: all of them.")
    ] = None,
    block_ms: Annotated[float, typer.Option(min=0.1, help="A block's forward of a sample; a backward: twice.")] = 30.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each layout that count.")] = 10,
    json_file: JsonFile = None,
) -> None:
    """Measure how a training step of fixed size scales over data, tensor and context ranks on CPU processes.

    Engine, collectives and update are real; what a large model would compute in its blocks is slept, in forward and in
    backward, since real compute would fight over the cores. Ends with an error where the layouts' losses differ.

    Example: python -m megacode.tools.bench.scaling --processes 2 --steps 20
    """
    sizes = processes or [2, 4, 8]
    for size in sizes:
        if size not in (2, 4, 8):
            raise UserError(f"--processes {size}: the step is shared by 2, 4 or 8")
    with json_output(json_file) as write_json:
        rows = measure([1, *sorted(set(sizes))], block_ms / 1000, steps)
        write_json([dataclasses.asdict(row) for row in rows])
        print(table(rows))


if __name__ == "__main__":
    command_line(main)
