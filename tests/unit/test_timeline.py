"""The clock of a pipeline schedule: order, dependencies, and the bubble of the theory."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacode.parallel.schedule import one_f_one_b
from megacode.parallel.timeline import simulate

CASES = st.tuples(st.integers(1, 6), st.integers(1, 12)).map(lambda c: (c[0], c[1], 1)) | st.tuples(
    st.integers(2, 5), st.integers(1, 4), st.integers(2, 4)
).map(lambda c: (c[0], c[0] * c[1], c[2]))
"""(pipeline, micro-batches, virtual stages)"""


@given(CASES, st.sampled_from([0.5, 1.0, 2.0, 3.0]))
def test_each_rank_runs_its_list_in_order_without_overlap(case, backward):
    pipeline, num_micro_batches, virtual = case
    timeline = simulate(*case, backward=backward)
    assert len(timeline.ranks) == pipeline
    for rank, timed in enumerate(timeline.ranks):
        assert [t.operation for t in timed] == one_f_one_b(pipeline, rank, num_micro_batches, virtual)
        assert all(t.stop - t.start == (1 if t.operation.kind == "forward" else backward) for t in timed)
        assert all(a.stop <= b.start for a, b in pairwise(timed))


@given(CASES, st.sampled_from([0.5, 1.0, 2.0, 3.0]))
def test_an_operation_starts_as_soon_as_its_rank_is_free_and_its_input_is_there(case, backward):
    pipeline, _, virtual = case
    ranks = simulate(*case, backward=backward).ranks
    times = {
        (t.operation.kind, t.operation.chunk * pipeline + rank, t.operation.micro_batch): t
        for rank, timed in enumerate(ranks)
        for t in timed
    }
    for (kind, stage, micro_batch), timed in times.items():
        needs = []
        if kind == "forward" and stage > 0:
            needs.append(("forward", stage - 1, micro_batch))
        if kind == "backward":
            needs.append(("forward", stage, micro_batch))
            if stage < pipeline * virtual - 1:
                needs.append(("backward", stage + 1, micro_batch))
        own = ranks[stage % pipeline]
        position = own.index(timed)
        free = own[position - 1].stop if position else 0
        assert timed.start == max([free, *(times[need].stop for need in needs)])


@given(st.integers(1, 8), st.integers(0, 16), st.sampled_from([0.5, 1.0, 2.0, 3.0]))
def test_the_bubble_of_1f1b_is_the_theorys(pipeline, more, backward):
    num_micro_batches = pipeline + more
    share = simulate(pipeline, num_micro_batches, backward=backward).bubble_share
    assert share == pytest.approx((pipeline - 1) / (num_micro_batches + pipeline - 1))


@given(st.integers(2, 6), st.integers(1, 4), st.integers(2, 4))
def test_interleaving_divides_the_bubble(pipeline, groups, virtual):
    num_micro_batches = pipeline * groups
    share = simulate(pipeline, num_micro_batches, virtual).bubble_share
    assert share == pytest.approx((pipeline - 1) / (virtual * num_micro_batches + pipeline - 1))


def test_four_ranks_by_hand():
    """p = 4, m = 4: the last rank alternates from time 3 on; rank 0 ends last, after 3 (m + p - 1) units."""
    timeline = simulate(4, 4)
    assert [(t.start, t.stop) for t in timeline.ranks[3]][:3] == [(3, 4), (4, 6), (6, 7)]
    assert timeline.duration == timeline.ranks[0][-1].stop == 21
    assert timeline.bubble_share == pytest.approx(3 / 7)
