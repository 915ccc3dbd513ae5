"""Context parallelism without ranks: who holds what, and attention from each rank's point of view."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacode.kernels.attention import attention_torch
from megacode.parallel.context import ContextAttention, _GatherSequence, context_columns, own_part, query_segments
from megacode.parallel.pipeline import MicroBatch


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
        spans, queries, keys = query_segments(bounds, batch, sequence, size, chunks)
        flat_keys = [key for start, stop in spans for key in range(start, stop)]
        columns = context_columns(sequence, ranks, rank)
        flat_queries = [row * sequence + column for row in range(batch) for column in columns]
        assert (queries[-1], keys[-1]) == (len(flat_queries), len(flat_keys))
        for (q0, q1), (k0, k1) in zip(pairwise(queries), pairwise(keys), strict=True):
            for back, query in enumerate(reversed(flat_queries[q0:q1])):
                start = max(bound for bound in bounds if bound <= query)
                assert flat_keys[k0 : k1 - back] == list(range(start, query + 1))


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(("ranks", "batch"), [(2, 1), (3, 2)])
def test_each_ranks_attention_is_its_part_of_the_whole(monkeypatch, ranks, batch, masks):
    generator = torch.Generator().manual_seed(0)
    sequence, heads, kv_heads, head_dim = 4 * ranks, 4, 2, 8
    q = torch.randn(batch, sequence, heads, head_dim, generator=generator)
    k, v = torch.randn(2, batch, sequence, kv_heads, head_dim, generator=generator)
    cu_seqlens = None
    if masks:
        starts = [row * sequence + cut for row in range(batch) for cut in (0, 1, 5)]
        cu_seqlens = torch.tensor([*starts, batch * sequence], dtype=torch.int32)
    whole = attention_torch(q, k, v, cu_seqlens)
    monkeypatch.setattr(_GatherSequence, "apply", lambda local, group: torch.stack((k, v)))
    for rank in range(ranks):
        group = type("Group", (), {"size": lambda self: ranks, "rank": lambda self, rank=rank: rank})()
        mine = context_columns(sequence, ranks, rank)
        part = ContextAttention(group, attention_torch)(q[:, mine], k[:, mine], v[:, mine], cu_seqlens)
        torch.testing.assert_close(part, whole[:, mine])


def test_own_part_cuts_what_belongs_to_tokens_only():
    tokens = torch.arange(16).view(2, 8)
    cu_seqlens = torch.tensor([0, 8, 16])
    batch = MicroBatch(tokens, tokens + 1, tokens % 8, cu_seqlens)
    part = own_part(batch, 2, 1)
    assert part.tokens.tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert part.labels.tolist() == [[3, 4, 5, 6], [11, 12, 13, 14]]
    assert part.positions.tolist() == [[2, 3, 4, 5]] * 2
    assert part.groups is None
    assert part.cu_seqlens is cu_seqlens
    assert own_part(batch, 1, 0) is batch
