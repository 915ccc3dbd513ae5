"""What a training leaves, and how far two of them are apart: tensor by tensor, each rank's part by itself."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megacode.model.layers import Slice

GRADIENT, WEIGHT = "gradient", "weight"


@dataclass
class Outcome:
    """What a training leaves; in a layout, what one rank has of it."""

    losses: list[float] = field(default_factory=list)
    """Of each step, the mean negative log-likelihood over the valid tokens."""
    norms: list[float] = field(default_factory=list)
    """Of each step, the gradient's norm over the whole model, before clipping."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step, before clipping, by global name; fp32, on the CPU."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """At the end, by global name; fp32, on the CPU."""
    parts: dict[str, Slice] = field(default_factory=dict)
    """Which part of a parameter this rank's tensors are; left out, they are the whole."""
    moved: float = math.nan
    """Norm of all weights' way from the first step's start to the last one's end; of one process only."""
    seconds: float = 0.0
    """That the steps took."""

    def save(self, path: Path) -> None:
        """Write it to a file from which `load` maps the tensors."""
        tensors = {f"{GRADIENT}.{name}": value for name, value in self.gradients.items()}
        tensors |= {f"{WEIGHT}.{name}": value for name, value in self.weights.items()}
        figures = {key: getattr(self, key) for key in ("losses", "norms", "moved", "seconds")}
        save_file(tensors, path, {"figures": json.dumps(figures)})

    @classmethod
    def load(cls, path: Path) -> "Outcome":
        """Read what `save` has written; the tensors stay in the file until something looks at them."""
        with safe_open(path, framework="pt") as file:
            outcome = cls(**json.loads(file.metadata()["figures"]))
            for key in file.keys():  # noqa: SIM118 - it is no dict
                kind, _, name = key.partition(".")
                (outcome.gradients if kind == GRADIENT else outcome.weights)[name] = file.get_tensor(key)
        return outcome


@dataclass(frozen=True)
class Deviation:
    """How far a part of a tensor is from the same part of the expected one."""

    kind: str
    """GRADIENT or WEIGHT."""
    name: str
    start: int
    """Where the part begins along the split dimension: copies have the same."""
    numel: int
    squares: float
    """Sum of the squared differences."""
    largest: float
    """Largest difference."""


@dataclass(frozen=True)
class Differences:
    """Largest differences of a training from the expected one; infinite where something is missing or not finite."""

    losses: tuple[float, ...]
    """Of each step, relative."""
    norms: tuple[float, ...]
    """Of each step, relative."""
    gradients: dict[str, float]
    """Of each parameter, the norm of the difference over the gradient's norm."""
    gradient: float
    """The same of all parameters but the embedding as one vector. (An embedding's row sums a gradient for each time
    that its token comes; in bf16 torch does so in bf16 on a CPU, 0.1 off for text of 2,048 tokens.)"""
    weight: float
    """Of any weight, absolute."""
    moved: float
    """Norm of all weights' differences over the norm of their way since the start."""

    @property
    def loss(self) -> float:
        """Of the worst step."""
        return max(self.losses)

    @property
    def norm(self) -> float:
        """Of the worst step."""
        return max(self.norms)

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter whose gradient differs most, and by how much."""
        return max(self.gradients.items(), key=lambda item: item[1], default=("", 0.0))


def deviations(outcome: Outcome, expected: Outcome) -> Iterator[Deviation]:
    """How far each tensor that a rank has is from its part of the expected one."""
    for kind, have, want in (
        (GRADIENT, outcome.gradients, expected.gradients),
        (WEIGHT, outcome.weights, expected.weights),
    ):
        for name, value in have.items():
            part = outcome.parts.get(name, Slice(tuple(value.shape), 0.0))
            difference = value.double() - part.take(want[name]).double()
            squares, largest = float(difference.square().sum()), float(difference.abs().max())
            yield Deviation(kind, name, part.start, value.numel(), _finite(squares), _finite(largest))


def compare(ranks: Sequence[Outcome], expected: Outcome) -> Differences:
    """How far a layout's training is from the expected one of as many steps.

    Args:
        ranks: of every rank, in any order; of ranks with the same parts one need have tensors.
        expected: of one process, with whole parameters.
    """
    found = [deviation for outcome in ranks for deviation in deviations(outcome, expected)]
    return combine(ranks, found, expected)


def combine(ranks: Sequence[Outcome], found: Sequence[Deviation], expected: Outcome) -> Differences:
    """The same, from the losses and norms that each rank knows, and the deviations of all ranks."""
    gradients = _squares(GRADIENT, found, expected.gradients)
    weights = _squares(WEIGHT, found, expected.weights)
    whole = {name: float(value.double().square().sum()) for name, value in expected.gradients.items()}
    others = [name for name in gradients if "embed_tokens" not in name]
    return Differences(
        _worst([outcome.losses for outcome in ranks], expected.losses),
        _worst([outcome.norms for outcome in ranks], expected.norms),
        {name: _share(gradients[name], whole[name]) for name in gradients},
        _share(sum(gradients[name] for name in others), sum(whole[name] for name in others)),
        math.inf if math.inf in weights.values() else max(d.largest for d in found if d.kind == WEIGHT),
        _share(sum(weights.values()), expected.moved**2),
    )


def _squares(kind: str, found: Sequence[Deviation], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Summed squared differences of each tensor; of copies the worst counts, and a part that nobody has is infinite."""
    parts: dict[str, dict[int, Deviation]] = {name: {} for name in expected}
    for deviation in found:
        if deviation.kind == kind:
            copies = parts[deviation.name]
            known = copies.get(deviation.start)
            if known is None or deviation.squares > known.squares:
                copies[deviation.start] = deviation
    return {
        name: sum(part.squares for part in copies.values())
        if sum(part.numel for part in copies.values()) == expected[name].numel()
        else math.inf
        for name, copies in parts.items()
    }


def _worst(ranks: Sequence[Sequence[float]], expected: Sequence[float]) -> tuple[float, ...]:
    """Of each step, the largest relative difference of any rank."""
    return tuple(
        max(_finite(abs(value - want) / abs(want)) for value in values)
        for want, *values in zip(expected, *ranks, strict=True)
    )


def _share(squares: float, whole: float) -> float:
    """The root of a share; 0 of 0 is 0."""
    return 0.0 if squares == 0 else _finite((squares / whole) ** 0.5) if whole else math.inf


def _finite(value: float) -> float:
    return value if value < math.inf else math.inf
