"""What tensor ranks exchange, as autograd functions and around linear maps.

Shoeybi et al. 2019, section 3: the functions f (identity, its backward sums) and g (sum, its backward is the identity).
With sequence parallelism (Korthikanti et al. 2022, section 4.2.2) f becomes an all-gather along the sequence whose
backward is a reduce-scatter, and g the reverse: the same bytes, and what lies between is split.

In shapes, `sequence` is what a context rank holds of each sequence.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megacode.model.linear import Wait
from megacode.parallel.heartbeat import finishing, waiting


def start_sum(x: Tensor, group: ProcessGroup) -> Wait:
    """Start an all-reduce of x, in place."""
    with waiting("all-reduce", "tensor"):
        work = dist.all_reduce(x, group=group, async_op=True)
    return lambda: _finish("all-reduce", work, x)


def start_gather(x: Tensor, group: ProcessGroup) -> Wait:
    """Start an all-gather of x [batch, part of the sequence, ...] -> [batch, sequence, ...]."""
    x, ranks = x.contiguous(), group.size()
    parts = x.new_empty(ranks, *x.shape)
    with waiting("all-gather", "tensor"):
        work = dist.all_gather_into_tensor(parts.flatten(0, 1), x, group=group, async_op=True)
    return lambda: _finish("all-gather", work, parts).transpose(0, 1).flatten(1, 2)


def start_scatter_sum(x: Tensor, group: ProcessGroup) -> Wait:
    """Start a reduce-scatter of x [batch, sequence, ...] -> [batch, part of the sequence, ...]."""
    parts = x.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()  # [ranks, batch, part, ...]
    mine = torch.empty_like(parts[0])
    with waiting("reduce-scatter", "tensor"):
        work = dist.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=group, async_op=True)
    return lambda: _finish("reduce-scatter", work, mine, parts)


def _finish(kind: str, work: dist.Work | None, result: Tensor, *alive: Tensor) -> Tensor:
    """Wait for `work`; `alive` are tensors that it reads."""
    assert work is not None
    with finishing(kind, "tensor"):
        work.wait()
    return result


class Replicated:
    """The exchange around column-parallel maps whose input every tensor rank holds."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def collect(self, x: Tensor) -> Wait:
        return lambda: x

    def spread(self, grad: Tensor) -> Wait:
        """`grad` becomes the sum: it must be nobody else's."""
        return start_sum(grad, self.group)


class SplitSequence:
    """The exchange around column-parallel maps of whose input each tensor rank holds a part of the sequence."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def collect(self, x: Tensor) -> Wait:
        return start_gather(x, self.group)

    def spread(self, grad: Tensor) -> Wait:
        return start_scatter_sum(grad, self.group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.mark_dirty(x)
        return start_sum(x, group)()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return start_scatter_sum(x, group)()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return start_gather(grad, ctx.group)(), None


def sum_over_tensor_ranks(x: Tensor, group: ProcessGroup, split_sequence: bool) -> Tensor:
    """Where partial sums [batch, sequence, hidden] become the residual stream.

    The whole sum on every rank; its backward is the identity. With `split_sequence` each rank's part of it,
    [batch, sequence / ranks, hidden]; its backward is an all-gather.
    """
    return _ScatterSum.apply(x, group) if split_sequence else _Sum.apply(x, group)
