"""The clock of a pipeline schedule: order, dependencies, and the bubble of the theory."""

from itertools import pairwise

import pytest
from support.schedules import everywhere

from megacode.parallel import timeline as timelines
from megacode.parallel.schedule import one_f_one_b
from megacode.parallel.timeline import bubble_formula, simulate

BACKWARDS = (0.5, 1.0, 2.0, 3.0)


@everywhere
def test_each_rank_runs_its_list_in_order_without_overlap(case):
    pipeline, num_micro_batches, virtual = case
    for backward in BACKWARDS:
        timeline = simulate(*case, backward=backward)
        assert len(timeline.ranks) == pipeline
        for rank, timed in enumerate(timeline.ranks):
            assert [t.operation for t in timed] == one_f_one_b(pipeline, rank, num_micro_batches, virtual), case
            assert all(t.stop - t.start == (1 if t.operation.kind == "forward" else backward) for t in timed), case
            assert all(a.stop <= b.start for a, b in pairwise(timed)), case


@everywhere
def test_an_operation_starts_as_soon_as_its_rank_is_free_and_its_input_is_there(case):
    pipeline, _, virtual = case
    for backward in BACKWARDS:
        ranks = simulate(*case, backward=backward).ranks
        stops = {
            (t.operation.kind, t.operation.chunk * pipeline + rank, t.operation.micro_batch): t.stop
            for rank, timed in enumerate(ranks)
            for t in timed
        }
        for rank, timed in enumerate(ranks):
            free = 0.0
            for t in timed:
                kind, micro_batch = t.operation.kind, t.operation.micro_batch
                stage = t.operation.chunk * pipeline + rank
                needs = []
                if kind == "forward" and stage > 0:
                    needs.append(("forward", stage - 1, micro_batch))
                if kind == "backward":
                    needs.append(("forward", stage, micro_batch))
                    if stage < pipeline * virtual - 1:
                        needs.append(("backward", stage + 1, micro_batch))
                assert t.start == max([free, *(stops[need] for need in needs)]), case
                free = t.stop


@everywhere
def test_the_bubble_is_the_theorys(case):
    for backward in BACKWARDS:
        assert simulate(*case, backward=backward).bubble_share == pytest.approx(bubble_formula(*case)), case


def test_a_schedule_that_hangs_is_an_error(monkeypatch):
    """The last of two ranks wants to go back before it has gone forward."""
    monkeypatch.setattr(timelines, "one_f_one_b", lambda p, rank, m, v: one_f_one_b(p, rank, m, v)[:: 1 - 2 * rank])
    with pytest.raises(AssertionError, match="hangs"):
        simulate(2, 3)


def test_four_ranks_by_hand():
    """p = 4, m = 4: the last rank alternates from time 3 on; rank 0 ends last, after 3 (m + p - 1) units."""
    timeline = simulate(4, 4)
    assert [(t.start, t.stop) for t in timeline.ranks[3]][:3] == [(3, 4), (4, 6), (6, 7)]
    assert timeline.duration == timeline.ranks[0][-1].stop == 21
    assert timeline.bubble_share == pytest.approx(3 / 7) == bubble_formula(4, 4)
    assert bubble_formula(4, 4, 2) == 3 / 11
