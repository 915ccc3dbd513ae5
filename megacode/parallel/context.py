"""Context parallelism: ranks share each sequence, and each gathers the keys and values of all (Llama 3, section 3.3.2).

The sequence is cut into 2 x ranks chunks; rank r holds chunk r and the r-th from the end (zig-zag), so that all ranks
have as many pairs of query and key to compute under a causal mask. Everything but attention is local to a token.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import ProcessGroup

from megacode.kernels.attention import Segments
from megacode.parallel.heartbeat import communicating
from megacode.parallel.pipeline import MicroBatch


def context_columns(sequence: int, ranks: int, rank: int) -> list[int]:
    """Which tokens of a sequence a context rank holds, in rising order."""
    assert sequence % (2 * ranks) == 0, "the plan refuses what can't be split"
    size = sequence // (2 * ranks)
    return [token for chunk in chunks_of(ranks, rank) for token in range(chunk * size, (chunk + 1) * size)]


def chunks_of(ranks: int, rank: int) -> tuple[int, int]:
    """The two chunks of a rank, of 2 x ranks."""
    return rank, 2 * ranks - 1 - rank


class Stretch(NamedTuple):
    """Tokens of one chunk of one sequence of a micro-batch."""

    row: int
    chunk: int
    start: int
    """Within the chunk."""
    stop: int


@dataclass(frozen=True)
class ContextSegments(Segments):
    """The segments of a context rank's queries, over the keys that these meet, one stretch after the other."""

    stretches: tuple[Stretch, ...]


def own_part(batch: MicroBatch, ranks: int, rank: int) -> MicroBatch:
    """A context rank's tokens of a micro-batch of whole sequences, on the host, and the segments that they meet."""
    if ranks == 1:
        return batch
    rows, sequence = batch.tokens.shape
    columns = context_columns(sequence, ranks, rank)
    lengths = batch.segments.lengths if batch.segments else (sequence,) * rows
    bounds = list(accumulate(lengths, initial=0))
    queries, keys, stretches = query_segments(bounds, rows, sequence, sequence // (2 * ranks), chunks_of(ranks, rank))
    groups = None if batch.groups is None else batch.groups[:, columns]
    tokens, labels, positions = (x[:, columns] for x in (batch.tokens, batch.labels, batch.positions))
    segments = ContextSegments(**vars(Segments.between(queries, keys)), stretches=stretches)
    return MicroBatch(tokens, labels, positions, segments, groups)


def query_segments(
    bounds: list[int], batch: int, sequence: int, size: int, chunks: tuple[int, int]
) -> tuple[list[int], list[int], tuple[Stretch, ...]]:
    """Document masks for the queries of some chunks of each sequence.

    Args:
        bounds: of segments over the flattened batch * sequence; each sequence begins one.
        batch: sequences.
        sequence: tokens of a whole one.
        size: tokens of a chunk.
        chunks: numbers of the chunks.

    Returns:
        Bounds of segments over the queries, and over the keys that they meet: for each chunk of each sequence those
        from its first segment's start to the chunk's end. And the stretches that these keys lie in, in order.
    """
    queries, keys, stretches = [0], [0], []
    segments = list(pairwise(bounds))
    for row in range(batch):
        for chunk in chunks:
            low = row * sequence + chunk * size
            high = low + size
            met = [(start, min(stop, high)) for start, stop in segments if start < high and stop > low]
            for start, stop in met:
                queries.append(queries[-1] + stop - max(start, low))
                keys.append(keys[-1] + stop - start)
            first, skipped = divmod(met[0][0] - row * sequence, size)
            stretches += [Stretch(row, each, skipped * (each == first), size) for each in range(first, chunk + 1)]
    return queries, keys, tuple(stretches)


class ContextAttention:
    """An attention core whose queries are this rank's part of a sequence and whose keys are all that precede them.

    Costs one all-gather of keys and values in forward, another in backward, and there one reduce-scatter of their
    gradients. Kept, keys and values of the whole sequence would stay as large however many ranks share the rest: at 8
    ranks 63 % of what a block of Code Llama 7B keeps under selective recomputation, 17 % with the 8 kv_heads of 34B. To
    gather them again costs bytes that grow with the sequence, beside arithmetic that grows with its square.

    Args:
        group: the context ranks.
        attention: the core for segments whose last tokens the queries are: (q, k, v, segments) -> as q.
        keep: keep what was gathered until backward. For full recomputation, where a forward that is run again is
            followed by its backward at once; what it keeps is its checkpoint's to decide, too.
    """

    def __init__(self, group: ProcessGroup, attention: Callable[..., Tensor], keep: bool = False) -> None:
        self.group, self.attention, self.keep = group, attention, keep

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        """q [batch, this rank's part of the sequence, heads, head_dim]; k, v with kv_heads -> as q.

        segments: the ContextSegments that `own_part` made.
        """
        assert isinstance(segments, ContextSegments)
        halves = zip(k.detach().chunk(2, 1), v.detach().chunk(2, 1), strict=True)
        own = torch.stack([x for half in halves for x in half])
        k, v = _Gather.apply(k, v, own, segments.stretches, self.group)
        again = _Again((k, v), lambda: _gather(own, segments.stretches, self.group))
        with nullcontext() if self.keep else saved_tensors_hooks(again.pack, again.unpack):
            return self.attention(q.flatten(0, 1)[None], k, v, segments).view(q.shape)


class _View(NamedTuple):
    number: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Again:
    """Keeps views of tensors for backward as numbers, and makes the tensors again when the first one is asked for.

    Args:
        tensors: whole storages.
        make: makes them again. Collective: ranks ask in the same order, that of their equal graphs.
    """

    def __init__(self, tensors: tuple[Tensor, ...], make: Callable[[], tuple[Tensor, ...]]) -> None:
        self.storages = [x.untyped_storage()._cdata for x in tensors]
        self.make, self.num_views, self.num_left = make, 0, 0
        self.made: tuple[Tensor, ...] = ()

    def pack(self, tensor: Tensor) -> Tensor | _View:
        """What autograd keeps of a tensor that it wants to."""
        storage = tensor.untyped_storage()._cdata
        if storage not in self.storages:
            return tensor
        self.num_views += 1
        return _View(self.storages.index(storage), tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, kept: Tensor | _View) -> Tensor:
        """The tensor; the last one lets go of all."""
        if isinstance(kept, Tensor):
            return kept
        if not self.made:
            self.made, self.num_left = self.make(), self.num_views
        tensor = self.made[kept.number].as_strided(kept.size, kept.stride, kept.offset)
        self.num_left -= 1
        if not self.num_left:
            self.made = ()
        return tensor


def _place(chunk: int, ranks: int) -> int:
    """Where the keys of a chunk are among the parts that ranks exchange; its values are the next one.

    Each rank gives four: keys and values of its early chunk, then those of its late one.
    """
    late = chunk >= ranks
    return 4 * (2 * ranks - 1 - chunk if late else chunk) + 2 * late


def _gather(own: Tensor, stretches: Sequence[Stretch], group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """This rank's parts [4, batch, chunk, kv_heads, head_dim] -> k and v of stretches of all ranks' chunks.

    These are [1, keys, kv_heads, head_dim], one stretch after the other.
    """
    ranks = group.size()
    parts = own.new_empty(ranks * len(own), *own.shape[1:])
    with communicating("all-gather", "context"):
        dist.all_gather_into_tensor(parts, own, group=group)
    k, v = (
        torch.cat([parts[_place(at.chunk, ranks) + i, at.row, at.start : at.stop] for at in stretches])[None]
        for i in range(2)
    )
    return k, v


class _Gather(torch.autograd.Function):
    """This rank's k, v [batch, part of the sequence, kv_heads, head_dim], which `own` are, as `_gather` gives them.

    One node for all that is cut and put together: autograd's own would fill a tensor of the whole sequence with zeros
    for each stretch of gradients, and add these up.
    """

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, own: Tensor, stretches: Sequence[Stretch], group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.shape, ctx.stretches, ctx.group = own.shape, stretches, group
        return _gather(own, stretches, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ranks, (num_parts, *shape) = ctx.group.size(), ctx.shape
        parts = grads[0].new_zeros(ranks * num_parts, *shape)
        lengths = [at.stop - at.start for at in ctx.stretches]
        for i, grad in enumerate(grads):
            for at, met in zip(ctx.stretches, grad[0].split(lengths), strict=True):
                parts[_place(at.chunk, ranks) + i, at.row, at.start : at.stop] += met
        mine = torch.empty_like(parts[:num_parts])
        with communicating("reduce-scatter", "context"):
            dist.reduce_scatter_tensor(mine, parts, group=ctx.group)
        return torch.cat((mine[0], mine[2]), 1), torch.cat((mine[1], mine[3]), 1), None, None, None
