"""What a Llama block is made of: the `Layers` protocol, and its one-process default in plain torch.

A model asks a `Layers` for its parts and never learns how many ranks share them. Every parameter describes itself by a
`Slice`, so that checkpoints, initialisation and norms need no table of the model.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacode.kernels import dispatch
from megacode.kernels.attention import Segments
from megacode.kernels.cross_entropy import IGNORE as IGNORE
from megacode.model.linear import ALONE, Exchange, linears
from megacode.recipe import Recompute


@dataclass(frozen=True)
class Slice:
    """Which part of a global parameter a rank holds: `start:stop` along `dim`, or all of it.

    The local tensor may be longer than `stop - start` along `dim`: the rest is padding, zero for ever.
    """

    shape: tuple[int, ...]
    """Shape of the whole, unpadded parameter."""
    std: float
    """Standard deviation of the initial values; 0 stands for a norm's ones."""
    dim: int | None = None
    """The split dimension; None: every tensor rank holds the same whole parameter."""
    start: int = 0
    stop: int = 0

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of the whole parameter, without padding."""
        return whole if self.dim is None else whole.narrow(self.dim, self.start, self.stop - self.start)

    def strip(self, local: Tensor) -> Tensor:
        """The local tensor without its padding."""
        return local if self.dim is None else local.narrow(self.dim, 0, self.stop - self.start)


def describe(parameter: nn.Parameter, part: Slice) -> nn.Parameter:
    """Attach its `Slice` to a parameter."""
    parameter.part = part  # type: ignore[attr-defined]
    return parameter


def part_of(parameter: nn.Parameter) -> Slice:
    """The `Slice` that a parameter carries."""
    part = parameter.part  # type: ignore[attr-defined]
    assert isinstance(part, Slice)
    return part


def initial_values(name: str, part: Slice, seed: int) -> Tensor:
    """The whole initial parameter, fp32: a function of seed and global name, the same for every layout."""
    if part.std == 0:
        return torch.ones(part.shape)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    return torch.empty(part.shape).normal_(0.0, part.std, generator=generator)


class Norm(nn.Module):
    """RMSNorm with its weight.

    Args:
        hidden: of x [..., hidden].
        epsilon: added to the mean square.
        alone, of_sum: the kernels, as `rms_norm_torch` and `add_rms_norm_torch`.
    """

    def __init__(
        self, hidden: int, epsilon: float, alone: Callable[..., Tensor], of_sum: Callable[..., tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.alone, self.of_sum = partial(alone, epsilon=epsilon), partial(of_sum, epsilon=epsilon)
        self.weight = describe(nn.Parameter(torch.empty(hidden)), Slice((hidden,), 0.0))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]"""
        return self.alone(x, self.weight)


class Linear(nn.Module):
    """A bias-free linear map, or the part of one that `part` describes."""

    def __init__(self, local_out: int, local_in: int, part: Slice) -> None:
        super().__init__()
        self.weight = describe(nn.Parameter(torch.empty(local_out, local_in)), part)

    def forward(self, *inputs: Tensor, first: Callable[..., Tensor] | None = None) -> Tensor:
        """[..., in] -> [..., out]; with `first`, of what that makes of the inputs, in backward again."""
        return linears((self.weight,), *inputs, first=first)[0]


class Embedding(nn.Module):
    """Token ids to rows of the table."""

    def __init__(self, rows: int, hidden: int, part: Slice) -> None:
        super().__init__()
        self.weight = describe(nn.Parameter(torch.empty(rows, hidden)), part)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, sequence] -> [batch, sequence, hidden]"""
        return F.embedding(tokens, self.weight)


class Layers(Protocol):
    """The parts of a block, for one way of sharing it among ranks; `sequence` and `stream` in shapes as in llama.py."""

    recompute: Recompute
    """What backward computes again."""
    choices: Mapping[str, dispatch.Choice]
    """Which backend computes each operation that has several, and why."""
    rope: Callable[[Tensor, Tensor, Tensor, float, int], tuple[Tensor, Tensor]]
    """(q, k, positions, theta, head_dim) -> rotated q, k [batch, sequence, heads, head_dim]; half-split pairs as in HF.

    In place: q and k [batch, sequence, heads * head_dim] are given away.
    """
    attention: Callable[[Tensor, Tensor, Tensor, Segments | None], Tensor]
    """Causal attention core: q [batch, sequence, heads, head_dim], k and v with kv_heads, segments -> as q."""
    swiglu: Callable[[Tensor, Tensor], Tensor]
    """silu(gate) * up (Shazeer 2020), each [..., local ffn]."""

    def embedding(self, rows: int, hidden: int, std: float) -> nn.Module:
        """Token ids [batch, sequence] -> [batch, stream, hidden]."""
        ...

    def column(self, inputs: int, outputs: int, std: float) -> Linear:
        """A linear map whose outputs are split; `columns` applies it."""
        ...

    def row(self, inputs: int, outputs: int, std: float) -> Linear:
        """A linear map whose inputs are split: [batch, sequence, local inputs] -> the sum [batch, stream, outputs]."""
        ...

    def head(self, hidden: int, rows: int, std: float) -> nn.Module:
        """[batch, stream, hidden] -> this rank's logits [batch, sequence, its rows with padding]."""
        ...

    def norm(self, hidden: int, epsilon: float) -> Norm:
        """RMSNorm over the hidden dimension."""
        ...

    def columns(self, norm: Norm, x: Tensor, maps: Sequence[Linear]) -> tuple[Tensor, ...]:
        """The norm of x [batch, stream, hidden] through maps of `column`, [batch, sequence, local outputs] each."""
        ...

    def sum_columns(
        self, norm: Norm, x: Tensor, branch: Tensor, maps: Sequence[Linear]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x + branch, and `columns` of that sum."""
        ...

    def logits(self, padded: Tensor) -> Tensor:
        """What the head gives, without padding."""
        ...

    def loss(self, padded: Tensor, labels: Tensor, scale: Tensor | None) -> Tensor:
        """Negative log-likelihood of each label [batch, sequence], 0 where IGNORE: fp32, the same on every rank.

        What the head gives is given away: its memory becomes that of its gradient. scale: of the gradient that backward
        will come with, if it is known, fp32.
        """
        ...


class PlainLayers:
    """`Layers` of one process: nothing is split."""

    exchange: Exchange = ALONE

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        recompute: Recompute = "none",
        choices: Mapping[str, dispatch.Choice] | None = None,
    ) -> None:
        self.recompute = recompute
        self.choices = choices or dispatch.choose_all(dispatch.task(torch.device(device), dtype))
        names = ("rope", "attention", "swiglu")
        self.rope, self.attention, self.swiglu = (self.choices[name].function for name in names)
        self.cross_entropy = self.choices["cross_entropy"].function

    def embedding(self, rows: int, hidden: int, std: float) -> nn.Module:
        return Embedding(rows, hidden, Slice((rows, hidden), std))

    def column(self, inputs: int, outputs: int, std: float) -> Linear:
        return Linear(outputs, inputs, Slice((outputs, inputs), std))

    def row(self, inputs: int, outputs: int, std: float) -> Linear:
        return Linear(outputs, inputs, Slice((outputs, inputs), std))

    def head(self, hidden: int, rows: int, std: float) -> nn.Module:
        return Linear(rows, hidden, Slice((rows, hidden), std))

    def norm(self, hidden: int, epsilon: float) -> Norm:
        return Norm(hidden, epsilon, self.choices["rms_norm"].function, self.choices["add_rms_norm"].function)

    def columns(self, norm: Norm, x: Tensor, maps: Sequence[Linear]) -> tuple[Tensor, ...]:
        weights = [each.weight for each in maps]
        if self.recompute == "selective":
            return linears(weights, x, norm.weight, first=norm.alone, exchange=self.exchange)
        return linears(weights, norm(x), exchange=self.exchange)

    def sum_columns(
        self, norm: Norm, x: Tensor, branch: Tensor, maps: Sequence[Linear]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.recompute == "selective":
            total = x + branch
            return total, self.columns(norm, total, maps)
        total, normed = norm.of_sum(x, branch, norm.weight)
        return total, linears([each.weight for each in maps], normed, exchange=self.exchange)

    def logits(self, padded: Tensor) -> Tensor:
        return padded

    def loss(self, padded: Tensor, labels: Tensor, scale: Tensor | None) -> Tensor:
        return self.cross_entropy(padded.flatten(0, 1), labels.flatten(), expected=scale).view(labels.shape)
