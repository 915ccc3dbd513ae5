"""Pipeline schedules, as lists: complete, ordered, free of deadlock, lean; and the learning rate."""

from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
from support.schedules import everywhere
from support.training import recipe

from megacode.parallel.pipeline import _Sends
from megacode.parallel.schedule import forwards_only, one_f_one_b
from megacode.parallel.timeline import in_flight, in_flight_limit
from megacode.train.schedule import learning_rate


@everywhere
def test_each_micro_batch_goes_forward_and_then_back_through_each_chunk_once(case):
    pipeline, num_micro_batches, virtual = case
    for rank in range(pipeline):
        operations = one_f_one_b(pipeline, rank, num_micro_batches, virtual)
        numbers = {(o.kind, o.chunk, o.micro_batch): number for number, o in enumerate(operations)}
        assert len(numbers) == len(operations) == 2 * num_micro_batches * virtual, case
        for chunk in range(virtual):
            for m in range(num_micro_batches):
                assert numbers["forward", chunk, m] < numbers["backward", chunk, m], case


def replay(schedules, pipeline, virtual):
    """Run all ranks' lists, each operation as soon as its input is there; the set of what could not run."""
    last = pipeline * virtual - 1
    done = set()
    position = [0] * pipeline
    progress = True
    while progress:
        progress = False
        for rank, operations in enumerate(schedules):
            while position[rank] < len(operations):
                o = operations[position[rank]]
                stage = o.chunk * pipeline + rank
                if o.kind == "forward":
                    ready = stage == 0 or ("forward", stage - 1, o.micro_batch) in done
                else:
                    ready = (stage == last or ("backward", stage + 1, o.micro_batch) in done) and (
                        "forward", stage, o.micro_batch) in done  # fmt: skip
                if not ready:
                    break
                done.add((o.kind, stage, o.micro_batch))
                position[rank] += 1
                progress = True
    return [operations[p:] for operations, p in zip(schedules, position, strict=True)]


@everywhere
def test_no_deadlock(case):
    pipeline, num_micro_batches, virtual = case
    schedules = [one_f_one_b(pipeline, rank, num_micro_batches, virtual) for rank in range(pipeline)]
    assert replay(schedules, pipeline, virtual) == [[] for _ in range(pipeline)], case
    forwards = [forwards_only(pipeline, num_micro_batches, virtual) for _ in range(pipeline)]
    assert replay(forwards, pipeline, virtual) == [[] for _ in range(pipeline)], case


def transfers(operations, rank, pipeline, virtual):
    """What a rank sends and receives, as (edge, kind, receiving stage, micro-batch), each in the order it does so."""
    last = pipeline * virtual - 1
    sends, receives = [], []
    for o in operations:
        step = 1 if o.kind == "forward" else -1
        stage = o.chunk * pipeline + rank
        if stage != (0 if step == 1 else last):
            receives.append((((rank - step) % pipeline, rank), o.kind, stage, o.micro_batch))
        if stage != (last if step == 1 else 0):
            sends.append(((rank, (rank + step) % pipeline), o.kind, stage + step, o.micro_batch))
    return sends, receives


@everywhere
def test_neighbours_send_and_receive_in_the_same_order(case):
    """NCCL has no tags: in the one group of a direction, the order alone says which transfer is which."""
    pipeline, num_micro_batches, virtual = case
    for schedule in (
        lambda rank: one_f_one_b(pipeline, rank, num_micro_batches, virtual),
        lambda rank: forwards_only(pipeline, num_micro_batches, virtual),
    ):
        sides = [transfers(schedule(rank), rank, pipeline, virtual) for rank in range(pipeline)]
        for edge in {send[0] for sends, _ in sides for send in sends}:
            sent = [send for send in sides[edge[0]][0] if send[0] == edge]
            assert sent == [receive for receive in sides[edge[1]][1] if receive[0] == edge]


@everywhere
def test_activations_in_flight_stay_within_the_theory(case):
    pipeline, num_micro_batches, virtual = case
    for rank in range(pipeline):
        kept = list(in_flight(one_f_one_b(pipeline, rank, num_micro_batches, virtual), virtual))
        most = max(map(sum, kept))
        assert most == min(in_flight_limit(pipeline, rank, virtual), num_micro_batches * virtual), case
        assert all(0 <= chunk <= num_micro_batches for held in kept for chunk in held), case


def test_in_flight_by_hand():
    """p = 2, m = 2, v = 2, rank 1: forwards of both chunks, and what each backward lets go of."""
    operations = one_f_one_b(2, 1, 2, 2)
    assert [(o.kind[0], o.chunk, o.micro_batch) for o in operations] == [
        ("f", 0, 0), ("f", 0, 1), ("f", 1, 0), ("b", 1, 0), ("f", 1, 1), ("b", 1, 1), ("b", 0, 0), ("b", 0, 1),
    ]  # fmt: skip
    assert list(in_flight(operations, 2)) == [(1, 0), (2, 0), (2, 1), (2, 1), (2, 1), (2, 1), (2, 0), (1, 0)]
    assert [in_flight_limit(4, rank) for rank in range(4)] == [4, 3, 2, 1]
    assert [in_flight_limit(4, rank, 2) for rank in range(4)] == [11, 9, 7, 5]


def test_learning_rate_warms_up_to_the_peak_and_ends_at_a_thirtieth():
    config = recipe(optimizer={"learning_rate": 3e-4}, schedule={"steps": 100, "warmup_steps": 10})
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([3e-4 * (i + 1) / 10 for i in range(10)])
    assert max(rates) == rates[9] == pytest.approx(3e-4)
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert rates[-1] == pytest.approx(1e-5)
    # half-way down the cosine: the mean of peak and end
    assert rates[54] == pytest.approx(0.5 * (3e-4 + 1e-5))


def test_learning_rate_without_warm_up_starts_at_the_peak():
    config = recipe(optimizer={"learning_rate": 1.0}, schedule={"steps": 3, "warmup_steps": 0})
    assert [learning_rate(config, step) for step in range(3)] == pytest.approx([1.0, 0.5 * (1 + 1 / 30), 1 / 30])


@pytest.mark.parametrize(("pipeline", "virtual"), [(2, 1), (4, 1), (4, 2), (3, 3)])
def test_sends_are_let_go_of_while_the_schedule_runs(pipeline, virtual):
    """A neighbour's answer tells that it has what was sent before: few stay, however many micro-batches there are."""
    num_micro_batches, last = 12 * pipeline, pipeline * virtual - 1
    for rank in range(pipeline):
        mesh = SimpleNamespace(pipeline=pipeline, pipeline_rank=rank, stage_rank=lambda stage: stage)
        sends = _Sends(mesh, num_micro_batches, virtual, True)
        warm_up, most, waited = True, 0, []
        for operation in one_f_one_b(pipeline, rank, num_micro_batches, virtual):
            stage = operation.chunk * pipeline + rank
            forward = operation.kind == "forward"
            warm_up = warm_up and forward
            if stage != (0 if forward else last):
                sends.received(operation)
            if stage != (last if forward else 0):
                sends.add(operation, SimpleNamespace(wait=partial(waited.append, operation)), None)
            if not warm_up:
                most = max(most, sum(len(pending) for pending in sends._pending.values()))
        assert most <= 2 * pipeline * virtual
        sends.wait()
        total = sum((o.chunk * pipeline + rank) != (last if o.kind == "forward" else 0) for o in
                    one_f_one_b(pipeline, rank, num_micro_batches, virtual))  # fmt: skip
        assert len(waited) == len(set(waited)) == total
