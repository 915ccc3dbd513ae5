"""Pipeline schedules as lists of operations. Pure, no torch: the executor runs exactly these lists."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Operation:
    """One forward or backward of one micro-batch through one chunk of a pipeline rank."""

    kind: Literal["forward", "backward"]
    chunk: int
    """Index among this rank's chunks; chunk c of rank p is virtual stage c * pipeline + p."""
    micro_batch: int


def one_f_one_b(pipeline: int, rank: int, num_micro_batches: int, virtual_stages: int = 1) -> list[Operation]:
    """1F1B (Narayanan et al. 2021, section 2.2) of one pipeline rank; interleaved when it holds several chunks.

    Warm-up forwards, then one forward and one backward in turn, then the remaining backwards. Fewer micro-batches than
    stages are fine: the warm-up is then all forwards there are. Interleaved, micro-batches go in groups of `pipeline`
    through chunk after chunk, so their number must be a multiple of `pipeline`.
    """
    assert 0 <= rank < pipeline
    assert virtual_stages == 1 or num_micro_batches % pipeline == 0
    total = num_micro_batches * virtual_stages
    if virtual_stages == 1:
        warm_up = min(pipeline - rank - 1, total)
    else:
        warm_up = min((pipeline - rank - 1) * 2 + (virtual_stages - 1) * pipeline, total)

    def forward(k: int) -> Operation:
        return Operation("forward", *_place(k, pipeline, virtual_stages))

    def backward(k: int) -> Operation:
        chunk, micro_batch = _place(k, pipeline, virtual_stages)
        return Operation("backward", virtual_stages - 1 - chunk, micro_batch)

    operations = [forward(k) for k in range(warm_up)]
    for k in range(warm_up, total):
        operations += [forward(k), backward(k - warm_up)]
    return operations + [backward(k) for k in range(total - warm_up, total)]


def forwards_only(pipeline: int, num_micro_batches: int, virtual_stages: int = 1) -> list[Operation]:
    """The forwards of a validation, in the order of `one_f_one_b`; micro-batches as there."""
    assert virtual_stages == 1 or num_micro_batches % pipeline == 0
    return [
        Operation("forward", *_place(k, pipeline, virtual_stages)) for k in range(num_micro_batches * virtual_stages)
    ]


def _place(k: int, pipeline: int, virtual_stages: int) -> tuple[int, int]:
    """(chunk, micro-batch) of the k-th forward."""
    if virtual_stages == 1:
        return 0, k
    group, within = divmod(k, pipeline * virtual_stages)
    chunk, offset = divmod(within, pipeline)
    return chunk, group * pipeline + offset
