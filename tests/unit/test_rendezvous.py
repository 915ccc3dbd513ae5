"""The executor's transfers cannot hang on NCCL: no tags, one queue for each direction, a transfer needs both sides."""

import pytest
from support.schedules import SMALL, events_of, rendezvous

from megacode.parallel import pipeline as executor


@pytest.fixture(scope="module")
def programs():
    """(case, whether it trains) -> events of each rank: what the real `Pipeline` posts and waits for."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return {
            (case, train): [events_of(monkeypatch, rank, *case, train) for rank in range(case[0])]
            for case in SMALL
            for train in (True, False)
        }


def test_no_deadlock_with_a_queue_for_each_direction(programs):
    for case, ranks in programs.items():
        assert rendezvous(ranks) == [[] for _ in ranks], case


def test_one_queue_for_both_directions_would_hang(programs):
    """Why `Mesh.edges` has a group for each: even plain 1F1B, from the second micro-batch on."""
    hanging = {case for case, ranks in programs.items() if any(rendezvous(ranks, lambda edge: tuple(sorted(edge))))}
    trained = {case for case, train in programs if train and case[0] > 1 and case[1] > 1}
    validated = {case for case, train in programs if not train and case[0] == 2 and case[2] > 1}  # a ring of two
    assert hanging == {(case, True) for case in trained} | {(case, False) for case in validated}


def test_another_order_on_one_rank_is_noticed(monkeypatch):
    ranks = [events_of(monkeypatch, rank, 2, 4, 1, True) for rank in range(2)]
    plain = executor.one_f_one_b

    def swapped(*arguments):
        first, second, *others = plain(*arguments)
        return [second, first, *others]

    monkeypatch.setattr(executor, "one_f_one_b", swapped)
    with pytest.raises(AssertionError, match="meets"):
        rendezvous([events_of(monkeypatch, 0, 2, 4, 1, True), ranks[1]])


def test_each_transfer_is_posted_and_waited_for_once(programs):
    for (case, train), ranks in programs.items():
        pipeline, num_micro_batches, virtual = case
        transfers = num_micro_batches * (pipeline * virtual - 1) * (2 if train else 1)
        for kind in ("send", "receive"):
            assert sum(event.kind == kind for events in ranks for event in events) == transfers, case
        for events in ranks:
            posted = [(event.edge, event.tag) for event in events if event.kind != "wait"]
            assert len(set(posted)) == len(posted), case
            assert sorted(posted) == sorted((e.edge, e.tag) for e in events if e.kind == "wait"), case


def test_one_receive_at_a_time_is_ahead(programs):
    """Of each rank: its operations take their inputs in turn, and buffers for more would lie idle."""
    for case, ranks in programs.items():
        for rank, events in enumerate(ranks):
            ahead = None
            for event in (event for event in events if event.edge[1] == rank):
                if event.kind == "receive":
                    assert ahead is None, case
                    ahead = event.tag
                else:
                    assert event.tag == ahead, case
                    ahead = None
