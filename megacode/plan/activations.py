"""What forwards keep for their backwards, what a backward needs beyond it, and how many micro-batches are in flight.

Formulas: docs/plan.md. Pure arithmetic over a Job.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from megacode.parallel.schedule import one_f_one_b
from megacode.parallel.timeline import in_flight
from megacode.plan.job import Job
from megacode.plan.shape import PART_ELEMENTS, Moment, Shared


def activation_bytes(job: Job, layers: int = 1) -> float:
    """What one micro-batch's forward through some blocks keeps on one device (Korthikanti et al. 2022, section 4)."""
    token_bytes = sum(
        saved.token_bytes / sharing(job, saved.shared) for saved in job.shape.block.saved if job.recompute in saved.kept
    )
    return layers * job.local_tokens * token_bytes


def sharing(job: Job, shared: Shared) -> int:
    """How many tensor ranks share a tensor."""
    tensor = job.layout.tensor
    return {"tensor": tensor, "sequence": tensor if job.sequence_parallel else 1}[shared]


def stream_bytes(job: Job) -> float:
    """One micro-batch's hidden states as they lie between blocks."""
    return job.local_tokens * job.shape.hidden * job.shape.element_bytes / sharing(job, "sequence")


def last_norm_bytes(job: Job) -> float:
    """What the norm behind the last block keeps of one micro-batch."""
    return job.local_tokens * job.shape.last_norm / sharing(job, "sequence")


def copies_bytes(job: Job, copies: tuple[int, int, int]) -> float:
    """`Moment.copies` of one micro-batch."""
    case = 0 if job.layout.tensor == 1 else 2 if job.sequence_parallel else 1
    return copies[case] * job.local_tokens * job.shape.hidden * job.shape.element_bytes


def moment_bytes(job: Job, moment: Moment) -> float:
    """What a moment of backward adds to all that is kept, without gradients of weights."""
    split = moment.split / job.layout.tensor + moment.stream / sharing(job, "sequence")
    temporaries = 0.0
    if part := moment.part:
        elements = job.local_tokens * part.width / sharing(job, part.shared)
        temporaries = part.element_bytes * min(elements, PART_ELEMENTS)
    return job.local_tokens * split + copies_bytes(job, moment.copies) + temporaries


def block_moments(job: Job) -> list[tuple[float, Moment]]:
    """The worst moments of a block's backward, and the bytes of activations beyond those kept on one device."""
    again = 0.0
    if job.recompute == "full":
        again = activation_bytes(replace(job, recompute="none"))
        again += job.local_tokens * job.shape.block.kept_again / job.layout.tensor
        again -= stream_bytes(job)  # the block's input, which is there already
    return [
        (again + moment_bytes(job, moment), moment)
        for moment in job.shape.block.moments
        if job.recompute in moment.recompute
    ]


@dataclass(frozen=True)
class Load:
    """What is alive at one operation of a rank's schedule, before its own temporaries."""

    kind: Literal["forward", "backward"]
    chunk: int
    in_flight: tuple[int, ...]
    """Kept micro-batches by chunk, the operation's own among them."""
    forwards: tuple[int, ...]
    """Forwards done by chunk, the operation's own among them."""
    backwards: tuple[int, ...]
    """Backwards done by chunk, before the operation."""


@lru_cache(maxsize=4096)
def loads(pipeline: int, rank: int, num_micro_batches: int, virtual_stages: int) -> tuple[Load, ...]:
    """The operations of a rank's schedule that can be its worst moment: none that another surpasses in every part."""
    forwards, backwards = ([0] * virtual_stages for _ in range(2))
    found: dict[tuple[str, int], list[Load]] = {}
    operations = one_f_one_b(pipeline, rank, num_micro_batches, virtual_stages)
    for operation, held in zip(operations, in_flight(operations, virtual_stages), strict=True):
        if operation.kind == "forward":
            forwards[operation.chunk] += 1
        load = Load(operation.kind, operation.chunk, held, tuple(forwards), tuple(backwards))
        alike = found.setdefault((load.kind, load.chunk), [])
        if not any(_surpasses(early, load) for early in alike):
            alike[:] = [early for early in alike if not _surpasses(load, early)] + [load]
        if operation.kind == "backward":
            backwards[operation.chunk] += 1
    return tuple(load for alike in found.values() for load in alike)


def _surpasses(one: Load, other: Load) -> bool:
    """Whether `one` has no less of anything."""
    more = [a - b for a, b in zip(one.in_flight, other.in_flight, strict=True)]
    forwards, backwards = (
        [min(a, 2) - min(b, 2) for a, b in zip(getattr(one, name), getattr(other, name), strict=True)]
        for name in ("forwards", "backwards")
    )
    return min(more) >= 0 and min(forwards) >= 0 and min(backwards) >= 0
