"""When each operation of a pipeline schedule runs, by a clock that respects what waits for what. Pure, no torch."""

from dataclasses import dataclass

from megacode.parallel.schedule import Operation, one_f_one_b


@dataclass(frozen=True)
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
        """Idle time of all ranks over ranks x duration.

        1F1B: (p - 1) / (m + p - 1) for m >= p micro-batches on p ranks; interleaved with v chunks a rank:
        (p - 1) / (v m + p - 1) (Narayanan et al. 2021, section 2.2, who divide by the busy time instead).
        """
        busy = sum(timed.stop - timed.start for rank in self.ranks for timed in rank)
        return 1 - busy / (len(self.ranks) * self.duration)


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
    stops: dict[tuple[str, int, int], float] = {}
    waiting = list(range(pipeline))
    while waiting:
        rank = waiting.pop()
        while len(ranks[rank]) < len(lists[rank]):
            operation = lists[rank][len(ranks[rank])]
            stage = operation.chunk * pipeline + rank
            inputs = _inputs(operation, stage, pipeline * virtual_stages)
            if not all(key in stops for key in inputs):
                break
            free = ranks[rank][-1].stop if ranks[rank] else 0.0
            start = max([free, *(stops[key] for key in inputs)])
            stop = start + (1.0 if operation.kind == "forward" else backward)
            ranks[rank].append(Timed(operation, start, stop))
            stops[operation.kind, stage, operation.micro_batch] = stop
            step = 1 if operation.kind == "forward" else -1
            waiting.append((rank + step) % pipeline)
    assert all(len(done) == len(wanted) for done, wanted in zip(ranks, lists, strict=True)), "the schedule hangs"
    return Timeline(tuple(tuple(rank) for rank in ranks))


def _inputs(operation: Operation, stage: int, num_stages: int) -> list[tuple[str, int, int]]:
    """What an operation waits for, as (kind, virtual stage, micro-batch)."""
    micro_batch = operation.micro_batch
    if operation.kind == "forward":
        return [("forward", stage - 1, micro_batch)] if stage > 0 else []
    behind = [("backward", stage + 1, micro_batch)] if stage + 1 < num_stages else []
    return [("forward", stage, micro_batch), *behind]
