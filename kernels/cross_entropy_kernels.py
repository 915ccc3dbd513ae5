"""The Triton kernels of `cross_entropy`, which imports this module at its first call: importing it imports triton.

A program has one row of logits. Its threads take groups of `width` neighbouring columns, 16 bytes: whatever the number
of columns, all but the last few are read and written 16 bytes at a time, and the largest and the sum of a group are
found inside of a thread. Threads wait for each other only at the end of the row. `tile` groups are on their way at
once. Offsets that grow with the number of tokens are 64 bits wide.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

IGNORE = tl.constexpr(-100)
LOWEST = tl.constexpr(-1e38)
"""Where a maximum begins: finite, so that a logit of -inf counts as exp(-inf - LOWEST) = 0, not as exp(-inf + inf)."""


def kernel(function: Callable[..., None]) -> Any:
    """A Triton kernel that is not compiled anew for a rank whose part of the vocabulary begins at a multiple of 16."""
    return triton.jit(function, do_not_specialize=["start"])


def device(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return triton.jit(function)


@device
def places(first: tl.tensor, width: tl.constexpr, tile: tl.constexpr) -> tl.tensor:
    """[tile, width] columns, from group number `first` on."""
    return (first + tl.arange(0, tile))[:, None] * width + tl.arange(0, width)[None, :]


@device
def statistics(
    row: tl.tensor,
    columns: tl.tensor,
    local: tl.tensor,
    width: tl.constexpr,
    tile: tl.constexpr,
    eviction: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """A row's largest logit, its sum of exp(logit - largest) and the logit of column `local`: -inf if it has none.

    One pass, in which a new maximum scales the sum so far (Milakov and Gimelshein 2018). `eviction`: how soon what was
    read may leave the caches.
    """
    groups = columns // width
    largest = tl.full([tile], LOWEST, tl.float32)
    total = tl.zeros([tile], tl.float32)
    for first in range(0, groups, tile):
        inside = (first + tl.arange(0, tile) < groups)[:, None]
        place = row + places(first, width, tile)
        x = tl.load(place, mask=inside, other=float("-inf"), eviction_policy=eviction).to(tl.float32)
        higher = tl.maximum(largest, tl.max(x, axis=1))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(x - higher[:, None]), axis=1)
        largest = higher
    # Read before the threads wait for each other below, after which the first of them may write the gradient here.
    target = tl.load(row + local, mask=(local >= 0) & (local < columns), other=float("-inf")).to(tl.float32)
    last = groups * width + tl.arange(0, width)
    x = tl.load(row + last, mask=last < columns, other=float("-inf")).to(tl.float32)
    top = tl.maximum(tl.max(largest, axis=0), tl.max(x, axis=0))
    total = tl.sum(total * tl.exp(largest - top), axis=0) + tl.sum(tl.exp(x - top), axis=0)
    return top, total, target


@device
def slopes(
    row: tl.tensor,
    columns: tl.tensor,
    local: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    factor: tl.tensor,
    width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Writes factor * (softmax, minus 1 in column `local`) over a row of logits."""
    groups = columns // width
    scale = factor / total
    local = local.to(tl.int32)
    for first in range(0, groups, tile):
        inside = (first + tl.arange(0, tile) < groups)[:, None]
        column = places(first, width, tile)
        x = tl.load(row + column, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        slope = tl.exp(x - top) * scale
        tl.store(row + column, tl.where(column == local, slope - factor, slope), mask=inside)
    last = groups * width + tl.arange(0, width)
    x = tl.load(row + last, mask=last < columns, other=0.0).to(tl.float32)
    slope = tl.exp(x - top) * scale
    tl.store(row + last, tl.where(last == local, slope - factor, slope), mask=last < columns)


@device
def multiply(
    row: tl.tensor, columns: tl.tensor, factor: tl.tensor, width: tl.constexpr, tile: tl.constexpr, zero: tl.constexpr
) -> None:
    """Multiplies a row by a factor; with `zero` fills it with zeros, unread."""
    for first in range(0, tl.cdiv(columns, width), tile):
        column = places(first, width, tile)
        if zero:
            x = tl.zeros([tile, width], tl.float32)
        else:
            x = tl.load(row + column, mask=column < columns, other=0.0).to(tl.float32) * factor
        tl.store(row + column, x, mask=column < columns)


@kernel
def forward(
    logits: tl.tensor,
    labels: tl.tensor,
    losses: tl.tensor | None,
    tops: tl.tensor | None,
    totals: tl.tensor | None,
    factors: tl.tensor | None,
    stride: tl.tensor,
    factor_stride: tl.tensor,
    columns: tl.tensor,
    start: tl.tensor,
    unit: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Of a whole row the loss and, with `factors`, the gradient; without `losses` the statistics of a part of a row.

    tops [2, tokens] are the largest logit and that of the label.
    """
    token, tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row = logits + token * stride * unit
    label = tl.load(labels + token)
    if label != IGNORE:
        local = label - start
        # Where the gradient follows at once, the row is wanted again: before any that other programs have done with.
        eviction: tl.constexpr = "evict_first" if factors is None else "evict_last"
        top, total, target = statistics(row, columns, local, width, tile, eviction)
        if losses is None:
            tl.store(tops + token, top)
            tl.store(tops + tokens + token, target)
            tl.store(totals + token, total)
        else:
            tl.store(losses + token, tl.log(total) - (target - top))
            if factors is not None:
                factor = tl.load(factors + token * factor_stride)
                slopes(row, columns, local, top, total, factor, width, tile)
    else:
        if losses is None:
            tl.store(tops + token, 0.0)
            tl.store(tops + tokens + token, 0.0)
            tl.store(totals + token, 1.0)
        else:
            tl.store(losses + token, 0.0)
            if factors is not None:
                multiply(row, columns, 0.0, width, tile, zero=True)


@kernel
def gradient(
    logits: tl.tensor,
    labels: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    factors: tl.tensor,
    stride: tl.tensor,
    factor_stride: tl.tensor,
    columns: tl.tensor,
    start: tl.tensor,
    unit: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """The gradient of a part of a row, from the statistics of the whole row."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * stride * unit
    label = tl.load(labels + token)
    if label != IGNORE:
        factor = tl.load(factors + token * factor_stride)
        local = label - start
        slopes(row, columns, local, tl.load(tops + token), tl.load(totals + token), factor, width, tile)
    else:
        multiply(row, columns, 0.0, width, tile, zero=True)


@kernel
def rescale(
    slopes: tl.tensor,
    factors: tl.tensor,
    expected: tl.tensor,
    stride: tl.tensor,
    factor_stride: tl.tensor,
    expected_stride: tl.tensor,
    columns: tl.tensor,
    unit: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """Multiplies a row by factor / expected; where they are equal it is not even read."""
    token = tl.program_id(0).to(tl.int64)
    factor, hoped = tl.load(factors + token * factor_stride), tl.load(expected + token * expected_stride)
    if factor != hoped:
        multiply(slopes + token * stride * unit, columns, factor / hoped, width, tile, zero=False)
