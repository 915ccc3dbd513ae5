"""What a rank exchanges in a step: calls and bytes, by axis and kind. Formulas: docs/plan.md, "Communication".

Pure arithmetic over a Job; tests/dist/test_communication.py counts what really goes over the wire. Left out is what
does not grow with the model or the batch: norms, losses and label counts, a few small all-reduces a step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megacode.plan.job import Job

Axis = Literal["tensor", "context", "data", "pipeline"]
Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "send", "receive"]
Pass = Literal["forward", "backward", "again"]
"""A block's forward, its backward, and what backward repeats of the forward under full recomputation."""


@dataclass(frozen=True)
class Exchange:
    """One kind of communication of one rank."""

    name: str
    axis: Axis
    kind: Kind
    ranks: int
    """Size of the group."""
    calls: int
    """Collectives, or transfers, that the rank takes part in."""
    bytes: float
    """What the rank gives: an all-gather's own share, a reduce-scatter's whole input; of a receive what it gets."""
    most_calls: int = 0
    """Where DeepSpeed's buckets decide: at most so many calls, and at least `calls`; else 0."""
    least_bytes: float | None = None
    """Where DeepSpeed's prefetcher decides: at least so many bytes, and at most `bytes`."""

    @property
    def sent_bytes(self) -> float:
        """What leaves the rank in a ring: (n - 1) / n of the whole for a gather or a scatter, twice that for both."""
        others = self.ranks - 1
        factors = {"all-reduce": 2 * others / self.ranks, "all-gather": others, "reduce-scatter": others / self.ranks}
        return self.bytes * {"send": 1, "receive": 0, **factors}[self.kind]

    def __mul__(self, times: int) -> "Exchange":
        least = None if self.least_bytes is None else self.least_bytes * times
        return replace(
            self, calls=self.calls * times, bytes=self.bytes * times, most_calls=self.most_calls * times,
            least_bytes=least,
        )  # fmt: skip


def exchanges(job: Job, rank: int) -> list[Exchange]:
    """All that one device of a pipeline rank exchanges in a step, the small all-reduces left out."""
    found = [*_tensor(job, rank), *_context(job, rank), *_pipeline(job, rank), *_data(job, rank)]
    return [exchange for exchange in found if exchange.calls]


def sent_bytes(found: Iterable[Exchange]) -> float:
    """Sum over exchanges."""
    return sum(exchange.sent_bytes for exchange in found)


def hidden_bytes(job: Job) -> float:
    """Hidden states of one micro-batch's tokens on this context rank, over all tensor ranks."""
    return job.local_tokens * job.shape.hidden * job.shape.element_bytes


def boundary_bytes(job: Job) -> float:
    """What a rank sends to the neighbour stage for one micro-batch."""
    return hidden_bytes(job) / (job.layout.tensor if job.sequence_parallel or job.shape.megatron else 1)


def layer_exchanges(job: Job, direction: Pass) -> list[Exchange]:
    """What tensor ranks exchange in one micro-batch's pass through one block.

    Two all-reduces, of the sums after attention and feed-forward or of the gradients before them (Shoeybi et al. 2019,
    section 3). Sequence parallelism makes each one a gather and a scatter; backward gathers the maps' inputs once more,
    instead of keeping them (Korthikanti et al. 2022, section 4.2.2). What full recomputation repeats ends before the
    block's last sum, which no backward needs; Megatron-LM repeats that too.
    """
    if direction == "again":
        sums = 2 if job.shape.megatron else 1
        return _maps(job, sums, gathers=2) if job.sequence_parallel else _maps(job, sums, gathers=0)
    return _maps(job, 2, gathers=4 if direction == "backward" else 2)


def end_exchanges(job: Job, first: bool, last: bool, backward: bool) -> list[Exchange]:
    """What tensor ranks exchange in one micro-batch's pass through embedding, head and loss, where a rank has them.

    The embedding's sum, the gradient of the head's input, and of the loss two all-reduces in fp32: a maximum of
    two numbers a token, and a sum of one.
    """
    found = []
    if first:
        found += _maps(job, int(not backward), gathers=int(backward))
    if last:
        found += _maps(job, int(backward), gathers=1)
        if not backward and job.layout.tensor > 1:
            found.append(Exchange("loss", "tensor", "all-reduce", job.layout.tensor, 2, 12 * job.local_tokens))
    return found


def _maps(job: Job, sums: int, gathers: int) -> list[Exchange]:
    """Sums of hidden states over tensor ranks, and under sequence parallelism gathers of each rank's part."""
    tensor, size, name = job.layout.tensor, hidden_bytes(job), "hidden states"
    if tensor == 1:
        return []
    if not job.sequence_parallel:
        return [Exchange(name, "tensor", "all-reduce", tensor, sums, sums * size)]
    return [
        Exchange(name, "tensor", "reduce-scatter", tensor, sums, sums * size),
        Exchange(name, "tensor", "all-gather", tensor, gathers, gathers * size / tensor),
    ]


def _tensor(job: Job, rank: int) -> list[Exchange]:
    layout, layers = job.layout, sum(job.chunk_layers(rank))
    ends = rank == 0, rank == layout.pipeline - 1
    found = [one * layers for direction in _passes(job) for one in layer_exchanges(job, direction)]
    found += [one for backward in (False, True) for one in end_exchanges(job, *ends, backward)]
    found = [one * layout.num_micro_batches for one in found]
    if job.sequence_parallel:  # each tensor rank has the gradients of its part of the sequence
        norms = layers * job.shape.block.replicated_parameters + (job.shape.hidden if ends[1] else 0)
        share = 4 * norms / layout.zero_size
        found.append(Exchange("gradients of norms", "tensor", "all-reduce", layout.tensor, 1, share))
    return merge(found)


def merge(found: Sequence[Exchange]) -> list[Exchange]:
    """Those of one name, axis and kind added up."""
    sums: dict[tuple[str, str, str], Exchange] = {}
    for one in found:
        key = one.name, one.axis, one.kind
        if key in sums:
            one = replace(sums[key], calls=sums[key].calls + one.calls, bytes=sums[key].bytes + one.bytes)
        sums[key] = one
    return list(sums.values())


def context_exchanges(job: Job, direction: Pass) -> list[Exchange]:
    """What context ranks exchange in one micro-batch's pass through one block.

    Keys and values of the whole sequence, gathered in forward and in backward once more, by the block's forward where
    that is run again; their gradients, summed and scattered in backward.
    """
    context, block = job.layout.context, job.shape.block
    if context == 1:
        return []
    own = job.local_tokens * block.kv_width * 2 / job.layout.tensor * job.shape.element_bytes
    gather = Exchange("keys and values", "context", "all-gather", context, 1, own)
    if direction != "backward":
        return [gather]
    scatter = Exchange("their gradients", "context", "reduce-scatter", context, 1, own * context)
    return [scatter] if job.recompute == "full" else [gather, scatter]


def _passes(job: Job) -> list[Pass]:
    passes: list[Pass] = ["forward", "backward"]
    return [*passes, "again"] if job.recompute == "full" else passes


def _context(job: Job, rank: int) -> list[Exchange]:
    times = sum(job.chunk_layers(rank)) * job.layout.num_micro_batches
    return merge([one * times for direction in _passes(job) for one in context_exchanges(job, direction)])


def _pipeline(job: Job, rank: int) -> list[Exchange]:
    """A hidden state forward and its gradient back, over each boundary between stages."""
    layout = job.layout
    stages = range(rank, len(layout.stages), layout.pipeline)
    behind, before = sum(stage < len(layout.stages) - 1 for stage in stages), sum(stage > 0 for stage in stages)
    calls = (behind + before) * layout.num_micro_batches
    size = calls * boundary_bytes(job)
    return [
        Exchange("hidden states and gradients", "pipeline", "send", 2, calls, size),
        Exchange("hidden states and gradients", "pipeline", "receive", 2, calls, size),
    ]


def _data(job: Job, rank: int) -> list[Exchange]:
    """ZeRO's reductions of gradients and gathers of parameters, over data x context."""
    return [] if job.layout.zero_size == 1 else [reduction(job, rank), gather(job, rank)]


def reduction(job: Job, rank: int) -> Exchange:
    """Gradients, each once a step or once a micro-batch, in buckets; below ZeRO-3 DeepSpeed all-reduces them.

    DeepSpeed fills a bucket until the next gradient does not fit: two neighbouring ones hold more than one bucket.
    """
    ranks, width = job.layout.zero_size, job.reduced_bytes or job.shape.element_bytes
    scatter = job.zero == 3 or job.shape.megatron
    rounds = [job.parameters(rank)]
    if job.reduce == "microbatch":
        rounds = job.chunk_parameters(rank) * job.layout.num_micro_batches
    largest = max(job.bucket_elements, job.shape.largest_matrix, job.vocabulary_rows * job.shape.hidden)
    size = sum(rounds) * width
    return Exchange(
        "gradients", "data", "reduce-scatter" if scatter else "all-reduce", ranks,
        calls=sum(-(-count // largest) for count in rounds),
        most_calls=sum(2 * -(-count // job.bucket_elements) - 1 for count in rounds),
        bytes=size,
    )  # fmt: skip


def gather(job: Job, rank: int) -> Exchange:
    """Parameters: below ZeRO-3 once, after the update, in two groups (norms do not decay).

    ZeRO-3 gathers each once a step; or under `gather: microbatch` before each use, unless the prefetcher came across it
    while it was there. A block's recomputation runs inside its backward, and needs no gather of its own.
    """
    ranks, share = job.layout.zero_size, job.parameters(rank) * job.shape.element_bytes / job.layout.zero_size
    if job.zero < 3:
        return Exchange("parameters", "data", "all-gather", ranks, 2, share)
    times = 2 * job.layout.num_micro_batches if job.gather == "microbatch" else 1
    layers, ends = sum(job.chunk_layers(rank)), (rank == 0) + 2 * (rank == job.layout.pipeline - 1)
    tensors = layers * job.shape.block.num_tensors + ends
    return Exchange(
        "parameters", "data", "all-gather", ranks, calls=1, most_calls=times * tensors, bytes=times * share,
        least_bytes=share,
    )  # fmt: skip
