"""Cross-entropy over logits whose vocabulary is whole or split over ranks: the loss of each token, in fp32.

loss = log(sum of exp(logit - top)) - (logit of the label - top), top the largest logit; 0 where the label is IGNORE.
The gradient, factor * (softmax - 1 at the label), is written over the logits while the loss is made.

Costs a token of V local bf16 logits, besides some 20 bytes: alone 4 * V bytes of memory (read and written once; in
between the row is read again, out of the caches) and about 25 * V FLOPs, two exponentials per logit among them: bound
by memory. Among ranks 6 * V, since all must have read before one can write, with one maximum of two fp32 numbers a
token and one sum of one over the ranks. Without a gradient 2 * V. What is kept for backward is the gradient alone.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacode.kernels.rows import at_least_fp32, row_parts

IGNORE = -100
"""Label of a token without loss."""
LOWEST = -1e38
"""Least top: finite, so that a logit of -inf counts as exp(-inf - LOWEST) = 0, not as exp(-inf + inf)."""


class Ranks(Protocol):
    """The ranks that hold the parts of a vocabulary, this one among them: all of them call both in the same order."""

    def maximum(self, x: Tensor) -> None:
        """Replaces fp32 x by its elementwise maximum over the ranks."""
        ...

    def sum(self, x: Tensor) -> None:
        """Replaces fp32 x by its sum over the ranks."""
        ...


class Losses(Protocol):
    """Computes losses, without autograd."""

    def __call__(
        self, logits: Tensor, labels: Tensor, start: int, ranks: Ranks | None, factors: Tensor | None
    ) -> Tensor:
        """The losses, fp32 [tokens], of logits [tokens, columns], whose rows are dense and do not overlap.

        With factors [tokens], fp32, writes the gradient of the sum of factor * loss over the logits.
        """
        ...


@dataclass(frozen=True)
class Computation:
    """What `cross_entropy` and `linear_cross_entropy` are made of, in plain torch or in Triton."""

    losses: Losses
    rescale: Callable[[Tensor, Tensor, Tensor], None]
    """(gradient [rows, columns], factors [rows], expected [rows]): multiplies each row by its factor / expected."""


def cross_entropy_torch(
    logits: Tensor,
    labels: Tensor,
    start: int = 0,
    ranks: Ranks | None = None,
    expected: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """The negative log-likelihood of each label, fp32 [tokens], in plain torch: the twin.

    Where a gradient is wanted the logits are given away: their memory holds the gradient afterwards, and whoever reads
    them later reads that. A node that had kept them for its backward refuses it, as after any operation in place. So
    does this one, in a second backward.

    Without `expected` the gradient of each loss is taken to be 1. Any other is right as well, but backward then reads
    and writes the gradient again (in bf16 it rounds again too) where it does nothing for what was expected.

    A label that no rank has a column for gives an infinite loss.

    Args:
        logits: [tokens, this rank's columns], bf16 or fp32. Of rows that overlap or are not dense a copy is taken.
        labels: [tokens] int64, in the whole vocabulary, or IGNORE: loss and gradient 0, whatever the logits are.
        start: this rank's first column in the whole vocabulary.
        ranks: who holds the other columns; None: nobody.
        expected: the gradient that will flow into the losses, fp32 on the logits' device, one number or [tokens], never
            0. It is the same on all ranks.
        columns: how many of the columns are of the vocabulary; the others are padding, and their gradient is 0. None:
            all. (Of a narrower view autograd would copy the gradient into zeros.)
    """
    return _apply(TORCH, logits, labels, start, ranks, expected, columns)


def cross_entropy_triton(
    logits: Tensor,
    labels: Tensor,
    start: int = 0,
    ranks: Ranks | None = None,
    expected: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """`cross_entropy_torch` in Triton, with the same bits in every run: one kernel alone, two among ranks.

    Rows whose stride is a multiple of 16 bytes are read and written 16 bytes at a time.
    """
    return _apply(TRITON, logits, labels, start, ranks, expected, columns)


def _apply(
    by: Computation,
    logits: Tensor,
    labels: Tensor,
    start: int,
    ranks: Ranks | None,
    expected: Tensor | None,
    columns: int | None,
) -> Tensor:
    logits = _dense(logits)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return by.losses(logits[:, :columns], labels, start, ranks, None)
    expected = logits.new_ones((), dtype=torch.float32) if expected is None else expected.detach()
    assert expected.dtype == torch.float32, expected.dtype
    assert expected.device == logits.device, (expected.device, logits.device)
    return _CrossEntropy.apply(logits, by, labels, start, ranks, expected.expand(labels.shape), columns)


def _dense(logits: Tensor) -> Tensor:
    """The logits, or where their rows overlap or their last stride is not 1 a copy."""
    columns = logits.shape[1]
    dense = logits.stride(0) >= columns and (logits.stride(1) == 1 or columns == 1)
    return logits if dense else logits.clone(memory_format=torch.contiguous_format)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        by: Computation,
        labels: Tensor,
        start: int,
        ranks: Ranks | None,
        expected: Tensor,
        columns: int | None,
    ) -> Tensor:
        losses = by.losses(logits[:, :columns], labels, start, ranks, expected)
        if columns is not None:
            logits[:, columns:] = 0
        # Autograd learns by the version that the logits are no longer what they were. Were they marked dirty, they
        # would be an output, and where they are a view (of padded or of unflattened ones) their gradient be copied.
        torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(logits, expected)
        ctx.by, ctx.columns = by, columns
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, expected = ctx.saved_tensors
        torch.autograd.graph.increment_version(gradient)  # it is given away, so a second backward finds it changed
        gradient = gradient.detach()
        ctx.by.rescale(gradient[:, : ctx.columns], grad, expected)
        return gradient, None, None, None, None, None, None


def _losses_torch(logits: Tensor, labels: Tensor, start: int, ranks: Ranks | None, factors: Tensor | None) -> Tensor:
    """`Losses` in plain torch."""
    tokens, columns = _sizes(logits, labels)
    local = labels - start
    foreign, ignored = (local < 0) | (local >= columns), labels == IGNORE
    local = local.masked_fill(foreign, 0).unsqueeze(1)
    wide = at_least_fp32(logits.dtype)
    tops, totals = logits.new_empty(2, tokens, dtype=wide), logits.new_empty(tokens, dtype=wide)
    for part, place, top, chosen, total in row_parts(logits, local, *tops, totals):
        torch.clamp(part.amax(1).to(wide), min=LOWEST, out=top)
        chosen.copy_(part.gather(1, place).squeeze(1))
        torch.sum((part - top.unsqueeze(1)).exp_(), 1, out=total)
    tops[1].masked_fill_(foreign, float("-inf"))
    losses = _combine(tops, totals, ignored, ranks)
    if factors is not None:
        scale, minus = factors / totals, factors.to(wide).masked_fill(foreign, 0.0).neg_()
        columns_of = (x.unsqueeze(1) for x in (tops[0], scale, minus, ignored))
        for part, place, top, factor, at_label, without in row_parts(logits, local, *columns_of):
            slope = (part - top).exp_().mul_(factor).scatter_add_(1, place, at_label)
            part.copy_(slope.masked_fill_(without, 0.0))
            del slope  # or else it would live beside the next
    return losses


def _losses_triton(logits: Tensor, labels: Tensor, start: int, ranks: Ranks | None, factors: Tensor | None) -> Tensor:
    """`Losses` by Triton kernels."""
    assert logits.dtype in (torch.float32, torch.bfloat16), logits.dtype
    tokens, columns = _sizes(logits, labels)
    labels, layout = labels.contiguous(), _layout(logits)
    stride, factor_stride = logits.stride(0) // layout["unit"], 0 if factors is None else factors.stride(0)
    sizes = (stride, factor_stride, columns, start)
    losses = logits.new_empty(tokens, dtype=torch.float32)
    if tokens == 0:
        return losses
    if ranks is None:
        _kernels().forward[(tokens,)](logits, labels, losses, None, None, factors, *sizes, **layout)
        return losses
    tops, totals = logits.new_empty(2, tokens, dtype=torch.float32), torch.empty_like(losses)
    _kernels().forward[(tokens,)](logits, labels, None, tops, totals, None, *sizes, **layout)
    losses = _combine(tops, totals, labels == IGNORE, ranks)
    if factors is not None:
        _kernels().gradient[(tokens,)](logits, labels, tops, totals, factors, *sizes, **layout)
    return losses


def _sizes(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """(tokens, columns)"""
    assert labels.shape == logits.shape[:1], (labels.shape, logits.shape)
    assert labels.dtype == torch.int64, labels.dtype
    assert logits.shape[1] > 0, logits.shape
    return logits.shape[0], logits.shape[1]


def _combine(tops: Tensor, totals: Tensor, ignored: Tensor, ranks: Ranks | None) -> Tensor:
    """The losses, from tops [2, tokens] (the largest logit, the label's) and totals [tokens] of this rank's columns.

    Both become those of the whole vocabulary. No rank has a label that is none: its top stays -inf.
    """
    if ranks is not None:
        own = tops[0].clone()
        ranks.maximum(tops)
        totals *= (own - tops[0]).exp()
        ranks.sum(totals)
    return (totals.log() - (tops[1] - tops[0])).masked_fill_(ignored, 0.0)


def _rescale_torch(gradient: Tensor, factors: Tensor, expected: Tensor) -> None:
    if gradient.device.type == "cpu" and torch.equal(factors, expected):  # elsewhere to ask would be to wait
        return
    for part, ratio in row_parts(gradient, (factors / expected).unsqueeze(1)):
        part *= ratio


def _rescale_triton(gradient: Tensor, factors: Tensor, expected: Tensor) -> None:
    tokens, columns = gradient.shape
    layout = _layout(gradient)
    strides = (gradient.stride(0) // layout["unit"], factors.stride(0), expected.stride(0))
    if tokens > 0:
        _kernels().rescale[(tokens,)](gradient, factors, expected, *strides, columns, **layout)


def _layout(logits: Tensor) -> dict[str, int]:
    """How a program goes over a row.

    A thread has two groups of 16 bytes on their way. A load takes about 0.8 us under load, in which each of an H200's
    132 processors must have 4.3 TB/s * 0.8 us / 132 = 26 KB on their way; of programs of 16 warps and 40 registers a
    thread it runs three, 48 KB. Their rows wait in the L2 cache to be read again: 3 * 132 of 32,016 bf16 logits are
    25 MB of its 50. Longer rows get 32 warps, so that only two, or one, are worked on at a time.
    """
    width = 16 // logits.element_size()
    groups = max(1, logits.shape[1] // width)
    tile = min(1024 if groups <= 4096 else 2048, 1 << (groups - 1).bit_length())
    # The kernel multiplies the stride by `unit`, from which the compiler sees that rows begin at multiples of it.
    return {"unit": math.gcd(logits.stride(0), width), "width": width, "tile": tile, "num_warps": max(1, tile // 64)}


TORCH = Computation(_losses_torch, _rescale_torch)
TRITON = Computation(_losses_triton, _rescale_triton)


@functools.cache
def _kernels() -> ModuleType:
    from megacode.kernels import cross_entropy_kernels

    return cross_entropy_kernels
