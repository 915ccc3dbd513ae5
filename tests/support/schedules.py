"""Pipelines of every small size, and what their ranks post and wait for when the real executor runs."""

from collections import defaultdict, deque
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.parallel import pipeline as executor
from megacode.parallel.pipeline import MicroBatch, Pipeline

SMALL = [
    (pipeline, num_micro_batches, virtual)
    for pipeline in range(1, 9)
    for virtual in range(1, 5 if pipeline > 1 else 2)
    for num_micro_batches in range(1, 17)
    if virtual == 1 or num_micro_batches % pipeline == 0
]
"""(pipeline, micro-batches, virtual stages): all that the recipe allows of pipeline <= 8, micro-batches <= 16,
virtual_stages <= 4, those with fewer micro-batches than ranks among them."""

LARGE = st.tuples(st.integers(9, 32), st.integers(1, 64)).map(lambda c: (*c, 1)) | st.tuples(
    st.integers(9, 16), st.integers(1, 4), st.integers(2, 8)
).map(lambda c: (c[0], c[0] * c[1], c[2]))
"""The same beyond that range, to be sampled."""


def everywhere(check):
    """Make a test of a check of one case: every small case, and some large ones."""

    @settings(max_examples=25)
    @given(LARGE)
    def sampled(case):
        check(case)

    def test():
        for case in SMALL:
            check(case)
        sampled()

    test.__doc__ = check.__doc__
    return test


@dataclass(frozen=True)
class Event:
    """What a rank does: post a send or a receive, or wait for what it posted."""

    kind: str
    """send, receive or wait"""
    edge: tuple[int, int]
    """(sending, receiving) rank"""
    tag: int


class Recorder:
    """Stands for torch.distributed in the executor: notes what is posted and what is waited for; nothing waits."""

    def __init__(self, rank):
        self.rank, self.events = rank, []

    def isend(self, tensor, peer, group, tag):
        return self._post("send", (self.rank, peer), group, tag)

    def irecv(self, tensor, peer, group, tag):
        tensor.zero_()
        return self._post("receive", (peer, self.rank), group, tag)

    def _post(self, kind, edge, group, tag):
        assert group == edge, "a transfer goes through the group of its direction"
        self.events.append(Event(kind, edge, tag))
        return SimpleNamespace(wait=lambda: self.events.append(Event("wait", edge, tag)))


class Ring(dict):
    """The groups of a mesh: each is named by its (sending, receiving) ranks."""

    def __missing__(self, edge):
        return edge


def events_of(monkeypatch, rank, pipeline, num_micro_batches, virtual, train):
    """What `Pipeline` posts and waits for on a rank, in order, in a training step or a validation."""
    recorder = Recorder(rank)
    monkeypatch.setattr(executor, "dist", recorder)
    mesh = SimpleNamespace(
        rank=rank, pipeline=pipeline, pipeline_rank=rank, stage_rank=lambda other: other % pipeline, edges=Ring()
    )
    runner = Pipeline(mesh, virtual, 1, torch.float32, torch.device("cpu"))
    ids = torch.zeros(1, 1, dtype=torch.int64)
    batches = [MicroBatch(ids, ids, ids, None) for _ in range(num_micro_batches)]
    weight = torch.ones(1, 1, 1, requires_grad=train)

    def forward(chunk, x, batch, last):
        y = (weight if x is batch.tokens else x) * 1
        return y[..., 0] if last else y

    if train:
        runner.train(batches, 1.0, forward, lambda scalar, last: scalar.backward())
    else:
        runner.evaluate(batches, forward)
    return recorder.events


def rendezvous(ranks, queue_of=lambda edge: edge):
    """Play the ranks' events against each other as NCCL does; what each rank could not do.

    A queue has two ends, one on each rank, in the order in which the rank posts. Only the two foremost transfers of a
    queue can go, and only when both are posted and are the two sides of one transfer; posting never blocks, waiting
    does. Which rank goes first makes no difference: nothing that could go is undone by another's step.

    Args:
        ranks: the events of each rank.
        queue_of: (sending, receiving) rank -> the queue; left out, each direction has its own, as `Mesh.edges` has.
    """
    posted, done = defaultdict(deque), [set() for _ in ranks]
    todo = [deque(events) for events in ranks]
    moved = True
    while moved:
        moved = False
        for rank, events in enumerate(todo):
            while events and (events[0].kind != "wait" or (events[0].edge, events[0].tag) in done[rank]):
                event = events.popleft()
                moved = True
                if event.kind != "wait":
                    posted[queue_of(event.edge), rank].append(event)
                    _go(posted, done, queue_of(event.edge), event.edge)
    return [list(events) for events in todo]


def _go(posted, done, queue, edge):
    """Let the foremost transfers of a queue between two ranks go, as many as can."""
    a, b = (posted[queue, rank] for rank in edge)
    while a and b and {a[0].kind, b[0].kind} == {"send", "receive"} and a[0].edge == b[0].edge:
        one, other = a.popleft(), b.popleft()
        assert one.tag == other.tag, f"{one} meets {other}"
        for rank in edge:
            done[rank].add((one.edge, one.tag))
