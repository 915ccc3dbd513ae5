"""A recipe's own training, on its own data, in layouts against one process: what `megacode verify --layout` runs."""

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megacode.checkpoint.origin import open_tokenizer, open_weights
from megacode.checkpoint.reader import global_order
from megacode.data.tokenizer import Tokenizer
from megacode.doctor.machine import training_device
from megacode.doctor.outcome import Deviation, Differences, Outcome, combine, deviations
from megacode.doctor.probe import in_layout, one_process
from megacode.doctor.processes import RanksError
from megacode.doctor.samples import StreamSamples
from megacode.engine.zero import DTYPES, check_config
from megacode.errors import UserError
from megacode.parallel.build import with_served_kernels
from megacode.plan.cases import Case, cases
from megacode.plan.model import num_parameters
from megacode.recipe import Recipe
from megacode.train import start
from megacode.train.launch import find_device, find_place

PEAK_SHARE = 0.1
"""Learning rate of each step, over the recipe's peak. A warm-up's first steps hardly move a weight; the peak without
one before it enlarges differences of 1e-7 a hundredfold within a few steps."""
REFERENCE_BYTES = 24
"""Of a parameter in one process: fp32 weight, gradient, two moments, and the copies that are compared."""
REFERENCE_TIMEOUT_SECONDS = 86_400.0
"""One process waits for nobody: it may take its time."""
TIMES_THE_REFERENCE, SHORTEST_TIMEOUT_SECONDS = 10, 300.0
"""A layout's collective that waits longer than so many times what one process took hangs."""


@dataclass(frozen=True)
class Tolerance:
    """Largest differences of a right layout, all relative; see docs/verify.md for what was measured."""

    loss: float
    norm: float
    gradient: float
    """fp32: of each gradient, to its norm; bf16: of all but the embedding's as one vector."""
    moved: float
    """Of all weights together, to their way since the start."""


TOLERANCES = {
    # Orders of summation differ, some 1e-7. Adam divides by the root of squared gradients, and where both are near zero
    # that enlarges it: weights need more room.
    "fp32": Tolerance(loss=1e-5, norm=1e-5, gradient=1e-4, moved=1e-3),
    # bf16 keeps 8 bits, one rounding is 4e-3: a mean over the tokens averages it out, a gradient has gone through some
    # ten of them, and Adam makes a step of either sign of a gradient that is smaller than its error.
    "bf16": Tolerance(loss=4e-3, norm=4e-2, gradient=4e-2, moved=0.25),
}


@dataclass
class Row:
    """What came of a layout."""

    case: Case
    figures: Outcome = field(default_factory=Outcome)
    """Losses, norms and seconds, as rank 0 has them."""
    differences: Differences | None = None
    """None where its ranks failed."""
    problems: list[str] = field(default_factory=list)
    """What is beyond the tolerance, or how its ranks failed; none where the layout is right."""


World = Callable[[int, float], AbstractContextManager[Any]]
"""(number of processes, timeout in seconds) -> ranks with a method `run(function, *args)`, as Processes have it."""


def prepare(recipe: Recipe, texts: Sequence[str], factor: float) -> tuple[Recipe, list[Case]]:
    """The recipe as it is compared, and that in each layout.

    It has its tokenizer's vocabulary, its model shrunk `factor` times, and a tenth of its peak learning rate.

    Raises:
        UserError: a layout is refused, data or first weights are not there, or one process can't hold the model; names
            the layout, the key or the file.
    """
    tokenizer, recipe = open_tokenizer(recipe)
    rate = PEAK_SHARE * recipe.optimizer.learning_rate
    optimizer = recipe.optimizer.model_copy(update={"learning_rate": rate})
    recipe, found = cases(recipe.model_copy(update={"optimizer": optimizer}), texts, factor)
    device = training_device()
    for case in found:
        served, refused = with_served_kernels(case.recipe, device, DTYPES[case.recipe.precision])
        for operation, error in refused.items():
            print(f"{case.words}: kernels.{operation} can't be as asked, and auto decides: {error}", flush=True)
        check_config(served, device)
    start.open_streams(recipe, tokenizer)
    if recipe.checkpoint.start_from is not None:
        open_weights(recipe, Path(recipe.checkpoint.start_from), new_stage=True).verify()
    needed, free = REFERENCE_BYTES * num_parameters(recipe.model), _free_bytes()
    if needed > free:
        raise UserError(
            f"the model in one process takes {needed / 2**30:.0f} GiB and {free / 2**30:.0f} GiB are free; "
            f"{'raise' if factor > 1 else 'shrink the model with'} --scale"
        )
    return recipe, found


def _free_bytes() -> int:
    """Memory of a GPU, if training is on GPUs, else what is free of the machine's."""
    if training_device().type == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).total_memory
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def place(wanted: Sequence[Case]) -> tuple[bool, str]:
    """Whether each rank of every layout has a GPU, and what to say of it.

    Else all layouts are on the CPU: figures of one table are to be comparable.
    """
    if training_device().type == "cpu":
        return False, "CPU processes, gloo"
    import torch

    most, here = max(case.layout.world_size for case in wanted), torch.cuda.device_count()
    if here < most:
        return False, f"CPU processes, gloo ({most} GPUs are needed and {here} are here)"
    return True, "GPUs, NCCL"


def verify(
    recipe: Recipe, wanted: Sequence[Case], steps: int, world: World, say: Callable[[str], None]
) -> tuple[Outcome, list[Row]]:
    """Train in one process and then in each layout; layouts of as many processes share them.

    Args:
        recipe: with the model that they have.
        wanted: what to compare.
        steps: of each training.
        world: gives ranks.
        say: gets a line before each training.

    Returns:
        What one process gives, and a row for each case, in their order.

    Raises:
        RanksError: the one process failed.
    """
    rows: dict[int, Row] = {}
    with tempfile.TemporaryDirectory(prefix="megacode-verify-") as folder:
        file = str(Path(folder) / "one_process.safetensors")
        say(f"one process, {steps} steps in fp32")
        with world(1, REFERENCE_TIMEOUT_SECONDS) as alone:
            alone.run(train_alone, recipe, steps, file)
        expected = Outcome.load(Path(file))
        timeout_seconds = max(SHORTEST_TIMEOUT_SECONDS, TIMES_THE_REFERENCE * expected.seconds)
        for size in sorted({case.layout.world_size for case in wanted}):
            with world(size, timeout_seconds) as ranks:
                for number, case in enumerate(wanted):
                    if case.layout.world_size == size:
                        say(f"{case.words} on {size} {'process' if size == 1 else 'processes'}")
                        rows[number] = _row(case, partial(ranks.run, train_case, case.recipe, steps, file), expected)
    return expected, [rows[number] for number in range(len(wanted))]


def train_alone(recipe: Recipe, steps: int, file: str) -> None:
    """The training in this process, its outcome written to a file."""
    one_process(recipe, _samples(recipe), steps, find_device(find_place())).save(Path(file))


def train_case(recipe: Recipe, steps: int, file: str) -> tuple[Outcome, list[Deviation]]:
    """A rank's figures, and how far its tensors are from those in the file. Collective over the world."""
    outcome = in_layout(recipe, _samples(recipe), steps)
    found = list(deviations(outcome, Outcome.load(Path(file))))
    return Outcome(outcome.losses, outcome.norms, seconds=outcome.seconds), found


def _samples(recipe: Recipe) -> StreamSamples:
    return StreamSamples(start.open_streams(recipe, Tokenizer(recipe.tokenizer.path))[0])


def _row(case: Case, run: Callable[[], list[tuple[Outcome, list[Deviation]]]], expected: Outcome) -> Row:
    try:
        ranks = run()
    except RanksError as error:
        return Row(case, problems=[str(error)])
    figures = [outcome for outcome, _ in ranks]
    differences = combine(figures, [deviation for _, found in ranks for deviation in found], expected)
    return Row(case, figures[0], differences, problems(figures, differences, expected, case.recipe.precision))


def problems(ranks: Sequence[Outcome], differences: Differences, expected: Outcome, precision: str) -> list[str]:
    """What is beyond the tolerance of a precision, a line each, with where it begins."""
    limit, found = TOLERANCES[precision], []
    for name, have, want, off, tolerance in (
        ("loss", [outcome.losses for outcome in ranks], expected.losses, differences.losses, limit.loss),
        ("norm", [outcome.norms for outcome in ranks], expected.norms, differences.norms, limit.norm),
    ):
        step = next((step for step, difference in enumerate(off) if difference > tolerance), None)
        if step is not None:
            value = max((values[step] for values in have), key=partial(_distance, want[step]))
            figures = f"{value:.7g}, in one process {want[step]:.7g}: {off[step]:.0e} off (tolerance {tolerance:.0e})"
            found.append(f"{name} of step {step + 1}: {figures}")
    gradients = _gradient_problems(differences, limit.gradient, precision)
    if differences.norms[0] > limit.norm and not gradients:
        found.append("the gradients of step 1 are right: it is the norm, and clipping by it, that is not the model's")
    found += gradients
    if differences.moved > limit.moved:
        found.append(f"weights: {differences.moved:.0e} of their way off (tolerance {limit.moved:.0e})")
    return found


def _distance(one: float, other: float) -> float:
    return abs(one - other) if math.isfinite(other) else math.inf


def _gradient_problems(differences: Differences, tolerance: float, precision: str) -> list[str]:
    if precision == "bf16":
        off = differences.gradient
        return [] if off <= tolerance else [f"gradients of step 1: {off:.0e} off (tolerance {tolerance:.0e})"]
    wrong = [name for name, off in differences.gradients.items() if off > tolerance]
    if not wrong:
        return []
    name, off = differences.worst
    first = min(wrong, key=global_order)
    return [
        f"gradients of step 1: {len(wrong)} of {len(differences.gradients)} wrong, most {name}, {off:.0e} of its norm "
        f"off (tolerance {tolerance:.0e}), the first {first}"
    ]
