"""Context parallelism without ranks: who holds what, and attention from each rank's point of view."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megacode.kernels.attention import attention_torch
from megacode.model.layers import PlainLayers
from megacode.model.llama import Llama
from megacode.parallel.context import ContextAttention, context_columns, own_part, query_segments
from megacode.parallel.pipeline import MicroBatch
from megacode.recipe import ModelSection


@given(st.integers(1, 6), st.integers(1, 5))
def test_ranks_share_a_sequence_and_its_work(ranks, size):
    sequence = 2 * ranks * size
    columns = [context_columns(sequence, ranks, rank) for rank in range(ranks)]
    assert sorted(column for mine in columns for column in mine) == list(range(sequence))
    # Under a causal mask a token's work is its place: equal sums, equal work.
    assert len({sum(mine) for mine in columns}) == 1


@st.composite
def segmented(draw):
    ranks, size, batch = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    sequence = 2 * ranks * size
    cuts = draw(st.sets(st.integers(1, batch * sequence - 1)) if batch * sequence > 1 else st.just(set()))
    starts = sorted(cuts | {row * sequence for row in range(batch)})
    return ranks, batch, sequence, [*starts, batch * sequence]


@given(segmented())
def test_query_segments_hold_just_what_a_token_may_see(case):
    """Each query's keys, read off the bounds, are those from its document's start to itself."""
    ranks, batch, sequence, bounds = case
    size = sequence // (2 * ranks)
    for rank in range(ranks):
        chunks = (rank, 2 * ranks - 1 - rank)
        queries, keys, stretches = query_segments(bounds, batch, sequence, size, chunks)
        firsts = [at.row * sequence + at.chunk * size for at in stretches]
        flat_keys = [
            first + key for first, at in zip(firsts, stretches, strict=True) for key in range(at.start, at.stop)
        ]
        columns = context_columns(sequence, ranks, rank)
        flat_queries = [row * sequence + column for row in range(batch) for column in columns]
        assert (queries[-1], keys[-1]) == (len(flat_queries), len(flat_keys))
        for (q0, q1), (k0, k1) in zip(pairwise(queries), pairwise(keys), strict=True):
            for back, query in enumerate(reversed(flat_queries[q0:q1])):
                start = max(bound for bound in bounds if bound <= query)
                assert flat_keys[k0 : k1 - back] == list(range(start, query + 1))


class Ranks:
    """Context ranks that take turns in one process: a gather gives the parts of all, a scatter takes notes."""

    def __init__(self, monkeypatch, parts):
        self.parts, self.given, self.gathers = parts, [], 0
        monkeypatch.setattr("torch.distributed.all_gather_into_tensor", self._gather)
        monkeypatch.setattr("torch.distributed.reduce_scatter_tensor", self._scatter)

    def size(self):
        return len(self.parts)

    def _gather(self, output, given, group):
        self.gathers += 1
        output.copy_(torch.cat(self.parts))

    def _scatter(self, output, given, group):
        self.given.append(given)
        output.zero_()


def in_chunks(x, ranks):
    """[batch, sequence, ...] -> each rank's early and late chunk."""
    chunks = x.detach().chunk(2 * ranks, 1)
    return [(chunks[rank], chunks[2 * ranks - 1 - rank]) for rank in range(ranks)]


@pytest.mark.parametrize(("keep", "gathers"), [(False, 2), (True, 1)])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(("ranks", "batch"), [(2, 1), (3, 2)])
def test_each_ranks_attention_is_its_part_of_the_whole(monkeypatch, ranks, batch, masks, keep, gathers):
    """Outputs and gradients, those of keys and values summed over ranks."""
    generator = torch.Generator().manual_seed(0)
    sequence, heads, kv_heads, head_dim = 4 * ranks, 4, 2, 8
    q, k, v, weights = (
        torch.randn(batch, sequence, n, head_dim, generator=generator).requires_grad_()
        for n in (heads, kv_heads, kv_heads, heads)
    )
    starts = [row * sequence + cut for row in range(batch) for cut in ((0, 1, 5) if masks else (0,))]
    tokens = torch.zeros(batch, sequence, dtype=torch.int64)
    micro_batch = MicroBatch.whole(tokens, tokens, tokens, [*starts, batch * sequence] if masks else None)
    whole = attention_torch(q, k, v, micro_batch.segments)
    expected = torch.autograd.grad(whole, (q, k, v), weights)
    halves = [in_chunks(x, ranks) for x in (k, v)]
    group = Ranks(
        monkeypatch, [torch.stack([own[rank][half] for half in range(2) for own in halves]) for rank in range(ranks)]
    )
    for rank in range(ranks):
        segments = own_part(micro_batch, ranks, rank).segments
        mine = context_columns(sequence, ranks, rank)
        own = [x[:, mine].detach().requires_grad_() for x in (q, k, v)]
        part = ContextAttention(group, attention_torch, keep)(*own, segments)
        torch.testing.assert_close(part, whole[:, mine])
        found = torch.autograd.grad(part, own, weights[:, mine])
        torch.testing.assert_close(found[0], expected[0][:, mine])
    assert group.gathers == gathers * ranks
    sums = sum(group.given).view(ranks, 2, 2, batch, -1, kv_heads, head_dim)  # [rank, half, k or v, ...]
    for i, gradient in enumerate(expected[1:]):
        for rank, own in enumerate(in_chunks(gradient, ranks)):
            torch.testing.assert_close(tuple(sums[rank, :, i]), own)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_never_asks_the_device(monkeypatch, ranks, recompute):
    """Forward and backward with document masks, on the meta device: whoever asks it for a value gets an error."""
    sequence, device = 16, torch.device("meta")
    tokens = torch.zeros(2, sequence, dtype=torch.int64)
    whole = MicroBatch.whole(tokens, tokens, tokens, [0, 3, 16, 16, 25, 32])
    batch = own_part(whole, ranks, 1 % ranks).to(device)
    layers = PlainLayers(device, recompute=recompute)
    if ranks > 1:
        monkeypatch.setattr("torch.distributed.all_gather_into_tensor", lambda *tensors, group: None)
        monkeypatch.setattr("torch.distributed.reduce_scatter_tensor", lambda *tensors, group: None)
        group = type("Group", (), {"size": lambda self: ranks})()
        layers.attention = ContextAttention(group, layers.attention)
    section = ModelSection(vocabulary=32, hidden=16, layers=1, heads=2, kv_heads=1, ffn=32, max_positions=sequence)
    with device:
        model = Llama(section, layers)
    losses = model(batch.tokens, batch.positions, batch.segments, batch.labels)
    losses.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    # What a layer would have to do to wait for its device does fail here, each in torch's own way.
    for ask in (Tensor.tolist, Tensor.nonzero, lambda x: x.max().item()):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            ask(batch.segments.cu_seqlens)


def test_own_part_cuts_what_belongs_to_tokens():
    tokens = torch.arange(16).view(2, 8)
    batch = MicroBatch.whole(tokens, tokens + 1, tokens % 8, [0, 8, 9, 16])
    part = own_part(batch, 2, 1)
    assert part.tokens.tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert part.labels.tolist() == [[3, 4, 5, 6], [11, 12, 13, 14]]
    assert part.positions.tolist() == [[2, 3, 4, 5]] * 2
    assert part.groups is None
    assert part.segments.cu_seqlens.tolist() == [0, 2, 4, 6, 8]  # two chunks of two sequences
    assert part.segments.lengths_k == (4, 6, 3, 5)  # the second sequence's first token is a document of its own
    assert own_part(batch, 1, 0) is batch
