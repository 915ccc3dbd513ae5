"""When each operation of a pipeline schedule runs, by a clock that respects what waits for what. Pure, no torch."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megacode.parallel.schedule import Operation, one_f_one_b


@dataclass(frozen=True, slots=True)
class Timed:
    """An operation with its time, in units of one chunk's forward."""

    operation: Operation
    start: float
    stop: float


@dataclass(frozen=True)
class Timeline:
    """One optimizer step of a pipeline."""

    ranks: tuple[tuple[Timed, ...], ...]
    """Operations of each pipeline rank, in the order in which it runs them."""

    @property
    def duration(self) -> float:
        """From the first operation's start to the last one's end."""
        return max(rank[-1].stop for rank in self.ranks)

    @property
    def bubble_share(self) -> float:
        """Idle time of all ranks over ranks x duration; `bubble_formula` is the theory's."""
        busy = sum(timed.stop - timed.start for rank in self.ranks for timed in rank)
        return 1 - busy / (len(self.ranks) * self.duration)


def bubble_formula(pipeline: int, num_micro_batches: int, virtual_stages: int = 1) -> float:
    """The bubble as a share of the step: (p - 1) / (v m + p - 1), whatever a backward takes.

    Narayanan et al. 2021, section 2.2, who divide by the busy time instead: (p - 1) / (v m). Chunks are alike,
    transfers take no time.
    """
    return (pipeline - 1) / (virtual_stages * num_micro_batches + pipeline - 1)


def in_flight(operations: Iterable[Operation], virtual_stages: int = 1) -> Iterator[tuple[int, ...]]:
    """At each operation of a pipeline rank, the micro-batches whose activations it keeps, by chunk.

    The operation's own is among them: a forward's from its start on, a backward's until its end.
    """
    held = [0] * virtual_stages
    for operation in operations:
        if operation.kind == "forward":
            held[operation.chunk] += 1
        yield tuple(held)
        if operation.kind == "backward":
            held[operation.chunk] -= 1


def in_flight_limit(pipeline: int, rank: int, virtual_stages: int = 1) -> int:
    """Most micro-batches in flight on a pipeline rank, each of one chunk: the warm-up's and one more.

    1F1B: p - rank (Narayanan et al. 2021, section 2.2); interleaved: 2 (p - rank - 1) + (v - 1) p + 1. However many
    micro-batches a step has; a step of fewer keeps all it has.
    """
    if virtual_stages == 1:
        return pipeline - rank
    return 2 * (pipeline - rank - 1) + (virtual_stages - 1) * pipeline + 1


def simulate(pipeline: int, num_micro_batches: int, virtual_stages: int = 1, backward: float = 2.0) -> Timeline:
    """The timeline of `one_f_one_b` where transfers take no time and all chunks are alike.

    Each rank runs its list in order, each operation as soon as its input is there: a forward waits for that of the
    virtual stage before, a backward for that of the stage behind and for its own forward.

    Args:
        pipeline: pipeline ranks.
        num_micro_batches: micro-batches of the step; a multiple of `pipeline` when `virtual_stages` is above 1.
        virtual_stages: chunks a rank.
        backward: time of a chunk's backward; its forward takes 1.
    """
    lists = [one_f_one_b(pipeline, rank, num_micro_batches, virtual_stages) for rank in range(pipeline)]
    ranks: list[list[Timed]] = [[] for _ in range(pipeline)]
    num_stages = pipeline * virtual_stages
    # When each is done, by virtual stage (one before the first, one behind the last) and micro-batch.
    at_once, never = [0.0] * num_micro_batches, math.inf
    forwards = [*([never] * num_micro_batches for _ in range(num_stages)), at_once]
    backwards = [*([never] * num_micro_batches for _ in range(num_stages)), at_once]
    waiting = set(range(pipeline))
    while waiting:
        rank = waiting.pop()
        operations, done = lists[rank], ranks[rank]
        free = done[-1].stop if done else 0.0
        while len(done) < len(operations):
            operation = operations[len(done)]
            stage, micro_batch = operation.chunk * pipeline + rank, operation.micro_batch
            if operation.kind == "forward":
                start, stops = forwards[stage - 1][micro_batch], forwards[stage]
                length, neighbour = 1.0, (rank + 1) % pipeline
            else:
                start, stops = max(forwards[stage][micro_batch], backwards[stage + 1][micro_batch]), backwards[stage]
                length, neighbour = backward, (rank - 1) % pipeline
            if start == never:
                break
            start = max(free, start)
            free = stops[micro_batch] = start + length
            done.append(Timed(operation, start, free))
            waiting.add(neighbour)
    assert all(len(done) == len(wanted) for done, wanted in zip(ranks, lists, strict=True)), "the schedule hangs"
    return Timeline(tuple(map(tuple, ranks)))
