"""The same training twice: in one plain process and in a layout, from the same weights on the same tokens.

Any recipe will do. Tokens are random and documents, where the recipe masks them, too; both are a function of the
recipe's seed, the step and the sample's place in it.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megacode.engine.zero import ZeroEngine, adam
from megacode.model.layers import IGNORE, PlainLayers, Slice, initial_values, part_of
from megacode.model.llama import Llama, initialise
from megacode.parallel.mesh import Mesh
from megacode.parallel.pipeline import MicroBatch
from megacode.plan.layout import Layout
from megacode.recipe import Recipe


@dataclass
class Outcome:
    """What a training leaves."""

    losses: list[float] = field(default_factory=list)
    """Of each step, the mean negative log-likelihood over the valid tokens."""
    norms: list[float] = field(default_factory=list)
    """Of each step, the gradient's norm over the whole model, before clipping."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """At the end, every whole parameter by its global name; fp32, on the CPU."""
    drift: float = 0.0
    """Largest difference between the copies of a parameter that several tensor ranks hold."""


@dataclass(frozen=True)
class Differences:
    """Largest differences between two outcomes; infinite where a value is not finite."""

    loss: float
    """Relative."""
    norm: float
    """Relative."""
    weight: float
    """Absolute; also between copies that should be equal."""

    @property
    def largest(self) -> float:
        """Of the three."""
        return max(self.loss, self.norm, self.weight)


def compare(actual: Outcome, expected: Outcome) -> Differences:
    """How far one outcome is from another, which has the same steps and parameters."""
    assert actual.weights.keys() == expected.weights.keys()
    return Differences(
        _relative(actual.losses, expected.losses),
        _relative(actual.norms, expected.norms),
        max(actual.drift, *(_finite((actual.weights[n] - e).abs().max()) for n, e in expected.weights.items())),
    )


def one_process(recipe: Recipe, steps: int, device: torch.device | str = "cpu") -> Outcome:
    """The recipe's training in one process, in fp32: plain torch, whole parameters, no DeepSpeed.

    The learning rate is the recipe's peak, in every step.
    """
    device, batch, clip = torch.device(device), recipe.batch, recipe.optimizer.clip
    with device:
        model = Llama(recipe.model, PlainLayers(device, torch.float32))
    initialise(model, recipe.seed)
    optimizer = adam(model.parameters(), recipe.optimizer)
    outcome = Outcome()
    for step in range(steps):
        tokens = Samples(recipe, step)
        total = 0.0
        for first in range(0, batch.global_samples, batch.micro_samples):
            micro = tokens.micro_batch(first, device)
            losses = model(micro.tokens, micro.positions, micro.cu_seqlens, micro.labels)
            loss = losses.sum() / tokens.num_valid
            loss.backward()
            total += loss.item()
        outcome.losses.append(total)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else float("inf"))
        outcome.norms.append(float(norm))
        optimizer.step()
        optimizer.zero_grad()
    outcome.weights = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    return outcome


def in_layout(recipe: Recipe, layout: Layout, mesh: Mesh, device: torch.device, steps: int) -> Outcome:
    """The recipe's training in its layout and precision. Collective; weights are on rank 0 only."""
    engine = ZeroEngine(recipe, layout, mesh, device)
    for name, parameter in engine.parameters.items():
        part = part_of(parameter)
        engine.write(name, part.take(initial_values(name, part, recipe.seed)))
    outcome, size = Outcome(), recipe.batch.micro_samples
    for step in range(steps):
        tokens = Samples(recipe, step)
        mine = [(number * mesh.zero_size + mesh.zero_rank) * size for number in range(layout.num_micro_batches)]
        batches = [tokens.micro_batch(first, device) for first in mine]
        loss = engine.train_step(batches, mesh.zero_size / tokens.num_valid)
        outcome.norms.append(float(engine.update(recipe.optimizer.learning_rate)[0]))
        dist.all_reduce(loss)  # every tensor rank of the last stage has the same, the other stages have zero
        outcome.losses.append(float(loss.sum()) / mesh.tensor / tokens.num_valid)
    _gather(engine, mesh, outcome)
    engine.engine.destroy()
    return outcome


class Samples:
    """The samples of a step, the same for whoever asks."""

    def __init__(self, recipe: Recipe, step: int) -> None:
        self.recipe = recipe
        generator = torch.Generator().manual_seed(1_000_003 * recipe.seed + step)
        count, length = recipe.batch.global_samples, recipe.batch.sequence_length
        assert recipe.model.vocabulary is not None

        def draw(limit: int, *shape: int) -> Tensor:
            return torch.randint(0, limit, shape, generator=generator)

        self.tokens = draw(recipe.model.vocabulary, count, length)
        labels = draw(recipe.model.vocabulary, count, length)
        # Samples have different numbers of labels with loss, so that a mean of means is not the mean.
        self.labels = labels.masked_fill(torch.arange(length) < draw(length, count, 1), IGNORE)
        self.cuts = draw(length, count)
        self.num_valid = int((self.labels != IGNORE).sum())

    def micro_batch(self, first: int, device: torch.device) -> MicroBatch:
        """Samples `first` and the following; with document masks each one is of two documents."""
        rows = slice(first, first + self.recipe.batch.micro_samples)
        tokens, labels = self.tokens[rows].to(device), self.labels[rows].to(device)
        batch, sequence = tokens.shape
        positions = torch.arange(sequence).repeat(batch, 1)
        cu_seqlens = None
        if self.recipe.data.document_masks:
            cuts = self.cuts[rows, None]
            positions = torch.where(positions < cuts, positions, positions - cuts)
            starts = torch.arange(batch)[:, None] * sequence + torch.cat((torch.zeros_like(cuts), cuts), dim=1)
            cu_seqlens = torch.cat((starts.flatten(), torch.tensor([batch * sequence]))).int().to(device)
        return MicroBatch(tokens, labels, positions.to(device), cu_seqlens)


def _gather(engine: ZeroEngine, mesh: Mesh, outcome: Outcome) -> None:
    """Put the whole parameters together, on rank 0, from the tensor ranks of all stages. Collective."""
    mine: dict[str, tuple[Slice, Tensor]] = {}
    for name, parameter in engine.parameters.items():
        value = engine.read(name).float().cpu()
        if mesh.zero_rank == 0:
            mine[name] = part_of(parameter), value
    parts: list[dict[str, tuple[Slice, Tensor]]] = [{}] * dist.get_world_size()
    dist.gather_object(mine, parts if mesh.rank == 0 else None, group=mesh.control_group)
    for name, (part, value) in (item for rank in parts for item in rank.items()):
        if name not in outcome.weights:
            outcome.weights[name] = torch.full(part.shape, float("nan"))  # a hole would show
        elif part.dim is None:
            outcome.drift = max(outcome.drift, _finite((outcome.weights[name] - value).abs().max()))
        part.take(outcome.weights[name]).copy_(value)


def _relative(actual: list[float], expected: list[float]) -> float:
    return max(_finite(abs(a - e) / abs(e)) for a, e in zip(actual, expected, strict=True))


def _finite(value: float | Tensor) -> float:
    value = float(value)
    return value if value < float("inf") else float("inf")
