"""`python -m megacode.tools.bench.scaling`: one training step over more processes, with sleeps for its compute."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacode.errors import UserError
from megacode.recipe import Recipe
from megacode.tools.bench.contest import contest_recipe, layout_words, step_batches
from megacode.tools.bench.ours import mesh_of, micro_batch, start_engine
from megacode.tools.bench.processes import Figures, Span, Team, figures_of, step_seconds

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megacode.engine.zero import ZeroEngine
    from megacode.model.linear import Exchange, Wait

SAMPLES = 8
"""Of a step, over all processes: a micro-batch each."""
FORWARD_PARTS = 4
"""A block's forward sleeps as often, once for what comes before each of its exchanges; its backward twice as long."""
LOSS_TOLERANCE = 1e-4
ANSWER_SECONDS = 180.0


@dataclass(frozen=True)
class Case:
    """A layout and its step."""

    processes: int
    parallel: dict[str, Any]
    """The recipe's section `parallel`; what it leaves of the processes are data ranks."""

    @property
    def model_ranks(self) -> int:
        """Processes that share a micro-batch."""
        return int(self.parallel.get("tensor", 1) * self.parallel.get("context", 1))

    @property
    def data(self) -> int:
        """Processes that share the micro-batches."""
        return self.processes // self.model_ranks

    @property
    def words(self) -> str:
        """For the table."""
        return layout_words({**({"data": self.data} if self.data > 1 else {}), **self.parallel})

    def recipe(self) -> Recipe:
        """A model so small that a step is its sleeps."""
        return contest_recipe("atom", SAMPLES // self.data, self.parallel, self.data)


@dataclass(frozen=True)
class Row:
    """What was measured of a case; seconds of a step."""

    processes: int
    layout: str
    seconds: Figures
    speed_up: float
    """Over one process of the same ZeRO stage."""
    efficiency: float
    asleep: float
    """What a rank's sleeps ask for."""
    communication: float
    """In which a rank stood in exchanges, mean over the ranks."""
    bare_seconds: Figures
    """Without sleeps."""


def cases_of(processes: int) -> list[Case]:
    """The layouts of so many processes."""
    if processes == 1:
        sections: list[dict[str, Any]] = [{"zero": 1}, {"zero": 3}]
    else:
        alone = {"tensor": processes, "zero": 1}
        sections = [{"zero": 1}, {"zero": 3}, alone, {**alone, "sequence": True}]
        sections += [{"context": processes, "zero": zero} for zero in (1, 3)]
    if processes == 8:
        sections.append({"tensor": 2, "sequence": True, "context": 2, "zero": 3})
    return [Case(processes, section) for section in sections]


@dataclass
class Pause:
    """A kernel's stand-in: keeps a rank, but no core, busy for so many seconds."""

    seconds: float = 0.0

    def __call__(self, kernels: int = 1) -> None:
        """As long as so many kernels."""
        if self.seconds:
            time.sleep(self.seconds * kernels)


class BusyExchange:
    """An exchange around linear maps that take time.

    As real kernels do, one goes on while the gathering of backward is under way, and the weights' one while the sum of
    the input's gradient is.
    """

    def __init__(self, exchange: Exchange, pause: Pause) -> None:
        self.exchange, self.pause = exchange, pause

    def collect(self, x: Tensor) -> Wait:
        """The product of the forward, or that of the weights' gradient, follows."""
        wait = self.exchange.collect(x)

        def wait_and_compute() -> Tensor:
            whole = wait()
            self.pause()
            return whole

        return wait_and_compute

    def spread(self, grad: Tensor) -> Wait:
        """The product of the input's gradient comes before."""
        self.pause()
        return self.exchange.spread(grad)


def make_busy(zero: ZeroEngine, pause: Pause) -> None:
    """Let an engine's blocks take the time of `FORWARD_PARTS` pauses forward, and twice as many backward."""
    from megacode.model.llama import Block

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pause()
        inputs[0].register_hook(lambda grad: pause(2))

    blocks = [module for module in zero.engine.module.modules() if isinstance(module, Block)]
    for block in blocks:
        for rows in (block.self_attn.o_proj, block.mlp.down_proj):
            rows.register_forward_pre_hook(before)
    layers = blocks[0].self_attn.layers
    layers.exchange = BusyExchange(layers.exchange, pause)


@dataclass(frozen=True)
class Answer:
    """A rank's step."""

    span: Span
    communication: float
    loss: float
    """This rank's part of the mean loss."""


def contestant(case: Case, block_seconds: float) -> Callable[[str], Answer]:
    """Trains a further step: one with sleeps ("busy"), or one without ("bare"). Collective, as what it returns is."""
    import torch
    import torch.distributed as dist

    from megacode.parallel.context import own_part
    from megacode.parallel.phases import record, stop_recording

    recipe, pause = case.recipe(), Pause()
    mesh = mesh_of(recipe)
    zero = start_engine(recipe, mesh)
    make_busy(zero, pause)
    num_labels, done = recipe.batch.global_samples * recipe.batch.sequence_length, 0

    def step(request: str) -> Answer:
        nonlocal done
        whole = [micro_batch(*batch) for batch in step_batches(recipe, done, mesh.data_rank, mesh.data)]
        batches = [own_part(batch, mesh.context, mesh.context_rank) for batch in whole]
        pause.seconds = block_seconds / FORWARD_PARTS / case.model_ranks if request == "busy" else 0.0
        done += 1
        dist.barrier()
        recorder, begun = record(torch.device("cpu")), time.perf_counter()
        total = zero.train_step(batches, mesh.zero_size / num_labels)
        zero.update(recipe.optimizer.learning_rate)
        ended, phases = time.perf_counter(), recorder.take()
        stop_recording()
        return Answer((begun, ended), phases["communication"], float(total.sum()) / mesh.tensor / num_labels)

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
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"busy": [], "bare": []})
    communication: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self, request: str) -> None:
        """Its turn."""
        answers: list[Answer] = self.team.ask(request, self.number)
        self.seconds[request].append(step_seconds(answer.span for answer in answers))
        self.losses.append(sum(answer.loss for answer in answers))
        if request == "busy":
            self.communication.append(mean(answer.communication for answer in answers))


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
        for _ in range(1 + steps):
            for run in runs:
                for request in run.seconds:
                    run.step(request)
            _check_losses(runs)
    finally:
        for run in runs:
            run.team.stop()
    return rows_of(runs, block_seconds)


def _check_losses(runs: list[Run]) -> None:
    expected = runs[0].losses[-1]
    for run in runs:
        if not abs(run.losses[-1] - expected) <= LOSS_TOLERANCE * abs(expected):
            raise RuntimeError(
                f"step {len(run.losses)}: the loss of {run.case.words} on {run.case.processes} processes is "
                f"{run.losses[-1]:.6f} and that of one process {expected:.6f}; they do not train the same"
            )


def rows_of(runs: list[Run], block_seconds: float) -> list[Row]:
    """What was measured; the first round was the warm-up."""
    alone = {run.case.parallel["zero"]: median(run.seconds["busy"][1:]) for run in runs if run.case.processes == 1}
    rows = []
    for run in runs:
        case, seconds = run.case, figures_of(run.seconds["busy"])
        speed_up = alone[case.parallel["zero"]] / seconds[0]
        asleep = SAMPLES * case.recipe().model.layers * block_seconds * 3 / case.processes
        rows.append(
            Row(
                case.processes, case.words, seconds, speed_up, speed_up / case.processes, asleep,
                median(run.communication[1:]), figures_of(run.seconds["bare"]),
            )
        )  # fmt: skip
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: a line a case."""
    head = [
        "processes", "layout", "step, s: median (lowest, highest)", "speed-up", "efficiency", "asleep, s",
        "in exchanges, s", "the rest, s", "step without sleeps, s",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        (middle, low, high), (bare, bare_low, bare_high) = row.seconds, row.bare_seconds
        cells = [
            str(row.processes), row.layout, f"{middle:.3f} ({low:.3f}, {high:.3f})", f"{row.speed_up:.2f}",
            f"{row.efficiency:.0%}", f"{row.asleep:.3f}", f"{row.communication:.3f}",
            f"{middle - row.asleep - row.communication:.3f}", f"{bare:.3f} ({bare_low:.3f}, {bare_high:.3f})",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    processes: Annotated[
        list[int] | None, typer.Option(help="A divisor of 8; may be repeated. Left out: 2, 4 and 8.")
    ] = None,
    block_ms: Annotated[float, typer.Option(min=0.1, help="Of one sample's forward; a backward: twice.")] = 60.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each layout that count.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure how a training step of fixed size scales over data, tensor and context ranks on CPU processes.

    Engine, collectives and update are real; what a large model would compute in a block is slept, in its forward and its
    backward, since real compute would fight over the cores.

    Example: python -m megacode.tools.bench.scaling --processes 2 --steps 20
    """
    sizes = processes or [2, 4, 8]
    for size in sizes:
        if size < 2 or SAMPLES % size:
            raise UserError(f"--processes {size} can't share the {SAMPLES} samples of a step; take 2, 4 or 8")
    rows = measure([1, *sizes], block_ms / 1000, steps)
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) if as_json else table(rows))


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
