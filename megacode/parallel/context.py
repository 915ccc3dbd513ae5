"""Context parallelism: ranks share each sequence, and each gathers the keys and values of all (Llama 3, section 3.3.2).

The sequence is cut into 2 x ranks chunks; rank r holds chunk r and the r-th from the end (zig-zag), so that all ranks
have as many pairs of query and key to compute under a causal mask. Everything but attention is local to a token.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megacode.parallel.heartbeat import communicating

Batch = TypeVar("Batch")


def context_columns(sequence: int, ranks: int, rank: int) -> list[int]:
    """Which tokens of a sequence a context rank holds, in rising order."""
    assert sequence % (2 * ranks) == 0, "the plan refuses what can't be split"
    size = sequence // (2 * ranks)
    return [token for chunk in chunks_of(ranks, rank) for token in range(chunk * size, (chunk + 1) * size)]


def chunks_of(ranks: int, rank: int) -> tuple[int, int]:
    """The two chunks of a rank, of 2 x ranks."""
    return rank, 2 * ranks - 1 - rank


def own_part(batch: Batch, ranks: int, rank: int) -> Batch:
    """A context rank's tokens of a micro-batch, on the host or the device; cu_seqlens stay those of whole sequences."""
    if ranks == 1:
        return batch
    assert is_dataclass(batch)
    assert not isinstance(batch, type)
    columns = context_columns(batch.tokens.shape[1], ranks, rank)  # type: ignore[attr-defined]
    names = {field.name for field in fields(batch)} & {"tokens", "labels", "positions", "infilled", "groups"}
    present = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
    return replace(batch, **{name: value[:, columns] for name, value in present.items()})


class ContextAttention:
    """An attention core whose queries are this rank's part of a sequence and whose keys are all that precede them.

    Costs one all-gather of keys and values in forward, and one reduce-scatter of their gradients in backward.

    Args:
        group: the context ranks.
        attention: the core for whole segments whose last tokens the queries are: (q, k, v, cu_seqlens of the queries,
            cu_seqlens of the keys) -> as q.
    """

    def __init__(self, group: ProcessGroup, attention: Callable[..., Tensor]) -> None:
        self.group, self.attention = group, attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """q [batch, local, heads, head_dim]; k, v [batch, local, kv_heads, head_dim] -> as q.

        cu_seqlens: segments over batch * the whole sequence; None: each sequence is one.
        """
        k, v = _GatherSequence.apply(torch.stack((k, v)), self.group)  # [batch, sequence, kv_heads, head_dim]
        chunks, size = chunks_of(self.group.size(), self.group.rank()), q.shape[1] // 2
        if cu_seqlens is None:
            parts = [
                self.attention(own, k[:, : (chunk + 1) * size], v[:, : (chunk + 1) * size], None)
                for own, chunk in zip(q.split(size, 1), chunks, strict=True)
            ]
            return torch.cat(parts, 1)
        spans, queries, keys = query_segments(cu_seqlens.tolist(), q.shape[0], k.shape[1], size, chunks)
        k, v = (torch.cat([x.flatten(0, 1)[start:stop] for start, stop in spans])[None] for x in (k, v))
        bounds = [torch.tensor(each, dtype=torch.int32, device=q.device) for each in (queries, keys)]
        return self.attention(q.flatten(0, 1)[None], k, v, *bounds).view(q.shape)


def query_segments(
    cu_seqlens: list[int], batch: int, sequence: int, size: int, chunks: tuple[int, int]
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Document masks for the queries of some chunks of each sequence.

    Args:
        cu_seqlens: bounds of segments over the flattened batch * sequence; each sequence begins one.
        batch: sequences.
        sequence: tokens of a whole one.
        size: tokens of a chunk.
        chunks: numbers of the chunks.

    Returns:
        Spans of the flattened keys, one a chunk of each sequence, from the first segment's start to the chunk's end;
        and bounds of segments over the queries and over the keys of these spans, one after the other.
    """
    spans, queries, keys = [], [0], [0]
    segments = list(pairwise(cu_seqlens))
    for row in range(batch):
        for chunk in chunks:
            low = row * sequence + chunk * size
            high = low + size
            met = [(start, min(stop, high)) for start, stop in segments if start < high and stop > low]
            for start, stop in met:
                queries.append(queries[-1] + stop - max(start, low))
                keys.append(keys[-1] + stop - start)
            spans.append((met[0][0], high))
    return spans, queries, keys


class _GatherSequence(torch.autograd.Function):
    """[2, batch, local, ...] of each rank -> [2, batch, sequence, ...] in the sequence's order."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        local = local.contiguous()
        parts = local.new_empty(group.size(), *local.shape)
        with communicating("all-gather", "context"):
            dist.all_gather_into_tensor(parts.flatten(0, 1), local, group=group)
        early, late = parts.unflatten(3, (2, -1)).unbind(3)  # [ranks, 2, batch, chunk, ...] each
        return torch.cat((early, late.flip(0))).movedim(0, 2).flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ranks = ctx.group.size()
        early, late = grad.unflatten(2, (2 * ranks, -1)).movedim(2, 0).chunk(2)  # [ranks, 2, batch, chunk, ...] each
        parts = torch.cat((early, late.flip(0)), 3).contiguous()  # [ranks, 2, batch, local, ...]
        mine = torch.empty_like(parts[0])
        with communicating("reduce-scatter", "context"):
            dist.reduce_scatter_tensor(mine, parts.flatten(0, 1), group=ctx.group)
        return mine, None
