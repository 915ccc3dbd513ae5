"""Who waits for whom: the groups of ranks, the chains through them, and what is said of it."""

import itertools

import pytest

from megacode.parallel.heartbeat import AXES, DEVICE_WAIT, Record
from megacode.plan.layout import Layout
from megacode.train.verdict import Seen, judge, members, roots, spans, waits_for

LAYOUT = Layout(pipeline=2, data=1, tensor=2, virtual_stages=1, num_micro_batches=4, stages=(range(2), range(2, 4)))
"""Ranks 0 and 1 are the tensor ranks of stage 0, 2 and 3 those of stage 1."""


def at(rank, state="forward of chunk 0, micro-batch 0", kind="", axis="", peer=-1, process="runs", step=3, **entered):
    record = Record(
        rank, 100 + rank, 1, "a", 1, 1, 0.0, step, False, state, kind, axis, peer,
        {name: entered.get(name, 5) for name in AXES}, 0, {},
    )  # fmt: skip
    return Seen(record, process, 60.0)


def in_tensor(rank, number=6, **more):
    return at(rank, kind="all-reduce", axis="tensor", tensor=number, **more)


def receiving(rank, peer, **more):
    return at(rank, kind="receive", peer=peer, **more)


MISSING = Seen(None, "missing", 60.0)


@pytest.mark.parametrize("sizes", itertools.product((1, 2, 3), repeat=4), ids=str)
def test_members_are_the_mesh_groups(sizes):
    import torch

    pipeline, data, context, tensor = sizes
    world = pipeline * data * context * tensor
    layout = Layout(pipeline, data, tensor, 1, 1, (), context)
    grid = torch.arange(world).view(sizes)
    # The orders and sizes that build_mesh makes its groups with.
    orders = {
        "data": ((0, 3, 1, 2), data * context), "context": ((0, 1, 3, 2), context), "tensor": ((0, 1, 2, 3), tensor),
        "model": ((1, 2, 0, 3), pipeline * tensor), "world": ((0, 1, 2, 3), world),
    }  # fmt: skip
    for axis, (order, size) in orders.items():
        for group in grid.permute(*order).reshape(-1, size).tolist():
            for rank in group:
                assert members(rank, axis, layout) == sorted(group)


CASES = {
    # name: (what ranks 0-3 do, who is to blame, words of the conclusion)
    "one has not entered": (
        [in_tensor(0), at(1, "reading data"), receiving(2, 0), receiving(3, 1)], [1],
        "stalled for 60 s: rank 1 (host a, process 101) stands in reading data of step 3; ranks 0, 2-3 wait for it",
    ),
    "one is a collective behind": (
        [in_tensor(0, 7), in_tensor(1, 6, process="stopped"), receiving(2, 0), receiving(3, 1)], [1],
        "rank 1 (host a, process 101) is stopped in all-reduce of tensor ranks 0-1",
    ),
    "one is stopped within a collective": (
        [in_tensor(0), in_tensor(1, process="stopped"), receiving(2, 0), receiving(3, 1)], [1],
        "ranks 0, 2-3 wait for it",
    ),
    "all have entered and nobody is to blame": (
        [in_tensor(0), in_tensor(1), receiving(2, 0), receiving(3, 1)], [0, 1],
        "ranks 0-1 stand in all-reduce of tensor ranks 0-1 in forward of chunk 0, micro-batch 0 of step 3, which all "
        "have entered and which does not end; ranks 2-3 wait for them",
    ),
    "who has gone through is not waited for": (
        [in_tensor(0, 6), at(1, "optimizer", tensor=6), at(2, kind="all-reduce", axis="world", world=6),
         at(3, kind="all-reduce", axis="world", world=6)], [0, 1],
        "rank 0 (host a, process 100) stands in all-reduce of tensor ranks 0-1 in forward of chunk 0",
    ),
    "a chain of receives": (
        [at(0, "reading data"), receiving(1, 0), receiving(2, 1), receiving(3, 2)], [0],
        "rank 0 (host a, process 100) stands in reading data of step 3; ranks 1-3 wait for it",
    ),
    "a circle": (
        [receiving(0, 2), in_tensor(1), receiving(2, 0), receiving(3, 1)], [0, 2],
        "rank 0 (host a, process 100) stands in receive from rank 2 in forward of chunk 0, micro-batch 0 of step 3, in "
        "a circle; rank 2 (host a, process 102) stands in receive from rank 0",
    ),
    "one has not started": (
        [at(rank, "starting", "rendezvous", "world", step=0) for rank in range(3)] + [MISSING], [3],
        "stalled for 60 s: rank 3 has not started, or ended before anybody saw; ranks 0-2 wait for it",
    ),
    "one has ended": (
        [in_tensor(0), in_tensor(1, process="ended"), receiving(2, 0), receiving(3, 1)], [1], "has ended in all-reduce",
    ),
    "a machine is not heard of": (
        [in_tensor(0), in_tensor(1), receiving(2, 0, process="unheard"), at(3, "optimizer", process="unheard")],
        [2, 3, 0, 1], "rank 3 (host a, process 103) is not heard of any more, last in optimizer of step 3",
    ),
    "held in native code": (
        [in_tensor(0), at(1, "reading data", process="held"), receiving(2, 0), receiving(3, 1)], [1],
        "rank 1 (host a, process 101) is held in native code in reading data of step 3",
    ),
    "held while it waits": (
        [in_tensor(0, process="held"), at(1, "reading data"), receiving(2, 0), receiving(3, 1)], [1],
        "stands in reading data",
    ),
    "two are to blame": (
        [at(0, "reading data"), at(1, "reading data"), receiving(2, 0), receiving(3, 1)], [0, 1],
        "ranks 0-1 stand in reading data of step 3; ranks 2-3 wait for them",
    ),
    "nobody waits": (
        [at(rank, "building the engine", step=0) for rank in range(4)], [0, 1, 2, 3],
        "stalled for 60 s: ranks 0-3 stand in building the engine",
    ),
    "the device of all": (
        [at(rank, "optimizer", DEVICE_WAIT) for rank in range(4)], [0, 1, 2, 3],
        "ranks 0-3 stand in wait for the device in optimizer of step 3",
    ),
    "the device, behind which one stands elsewhere": (
        [at(0, kind=DEVICE_WAIT), at(1, "reading data"), at(2, "optimizer", DEVICE_WAIT), receiving(3, 1)], [1],
        "rank 1 (host a, process 101) stands in reading data of step 3; ranks 0, 2-3 wait for it",
    ),
    "one is stopped beside a collective that its backend carries on": (
        [in_tensor(0), at(1, "backward", tensor=6, process="stopped"), receiving(2, 0), receiving(3, 1)], [1],
        "rank 1 (host a, process 101) is stopped in backward of step 3; ranks 0, 2-3 wait for it",
    ),
    "those that can't go on come first": (
        [at(0, "logging"), at(1, "logging", process="held"), at(2, "logging", process="stopped"), receiving(3, 0)],
        [2, 1, 0], "stalled for 60 s: rank 2 (host a, process 102) is stopped in logging of step 3; rank 1 (host a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_verdict(name):
    seen, culprits, words = CASES[name]
    verdict = judge(dict(enumerate(seen)), LAYOUT)
    assert verdict.culprits == culprits
    assert words in verdict.conclusion
    rows = verdict.table.splitlines()
    assert rows[0].split()[0] == "who"
    assert all("60 s" in row for row in rows[1:])


def test_a_send_waits_for_its_receiver():
    seen = {0: at(0, kind="send", peer=2), 1: at(1), 2: at(2), 3: at(3)}
    assert waits_for(0, seen, LAYOUT) == {2}
    assert "send to rank 2" in judge(seen, LAYOUT).table


def test_ranks_in_the_same_place_share_a_row_of_the_table():
    seen = {rank: at(rank, "starting", "rendezvous", "world", step=0) for rank in range(3)} | {3: MISSING}
    assert len(judge(seen, LAYOUT).table.splitlines()) == 3


@pytest.mark.parametrize("edges", itertools.product(*[[set(), {0}, {1}, {2}, {0, 1}, {1, 2}]] * 3), ids=str)
def test_every_rank_that_waits_leads_to_a_root(edges):
    awaited = {rank: edges[rank] - {rank} for rank in range(3)}
    found = set(roots(awaited))
    assert found
    assert {rank for rank in awaited if not awaited[rank]} <= found
    for rank in awaited:
        reached, ahead = {rank}, [rank]
        while ahead:
            new = awaited[ahead.pop()] - reached
            reached |= new
            ahead += new
        assert reached & found
    for rank in found:
        if awaited[rank]:  # in a circle that leads to nobody who is free
            assert any(rank in awaited[other] for other in awaited)


def test_spans():
    assert spans([3]) == "rank 3"
    assert spans([5, 0, 2, 1]) == "ranks 0-2, 5"
