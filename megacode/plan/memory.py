"""How many bytes each pipeline rank's devices hold at the worst moment of a step. Formulas and sources: docs/plan.md.

Bytes of tensors: a CUDA context, fragmentation and what NCCL allocates come on top.

A rank's micro-batches in flight are counted by walking the very list of operations that it will run. Four kinds of
moments are compared: a forward, a backward, the reduction after the schedule (`reduce: step`), the optimizer's update.
"""

from dataclasses import dataclass, replace
from typing import Literal

from megacode.engine.config import deepspeed_config
from megacode.plan.activations import (
    Load,
    activation_bytes,
    block_moments,
    copies_bytes,
    last_norm_bytes,
    loads,
    moment_bytes,
    stream_bytes,
)
from megacode.plan.job import Job, Offload
from megacode.plan.layout import Layout, vocabulary_rows
from megacode.plan.shape import PART_ELEMENTS, Moment, llama
from megacode.recipe import Recipe

SUB_GROUP_ELEMENTS = 10**9
"""DeepSpeed's sub_group_size: ZeRO-3 updates so many elements of its partition at a time."""

HEAD_COPIES = (1, 1, 2)
"""Hidden states in the head's backward, as `Moment.copies`."""

Phase = Literal["forward", "backward", "reduction", "update"]


@dataclass(frozen=True)
class StageMemory:
    """What a device of one pipeline rank holds at its worst moment."""

    pipeline_rank: int
    moment: Phase
    in_flight: int
    """Micro-batches, each of one chunk, whose activations are kept."""
    parameters_bytes: int
    """Training copies: whole, or a partition and what is gathered."""
    gradients_bytes: int
    optimizer_bytes: int
    """fp32 masters and two moments."""
    activations_bytes: int
    """What forwards keep for their backwards, without the logits, and the temporaries of one block's backward."""
    logits_bytes: int
    """Logits of one micro-batch, which become their gradient."""
    buffers_bytes: int
    """DeepSpeed's buckets, hidden states on their way to other stages."""
    host_bytes: int
    """In the host's memory, for each device: the copy that checkpoints are written from, and what is offloaded."""

    @property
    def total_bytes(self) -> int:
        """On the device."""
        states = self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes
        return states + self.activations_bytes + self.logits_bytes + self.buffers_bytes


def stage_memory(recipe: Recipe, layout: Layout) -> list[StageMemory]:
    """Memory of a recipe's step in a layout, one entry a pipeline rank.

    Args:
        recipe: with model.vocabulary filled in.
        layout: what `layout.fit` gives for it.
    """
    return memory(recipe_job(recipe, layout))


def recipe_job(recipe: Recipe, layout: Layout) -> Job:
    """A recipe's step as the formulas see it, with what its DeepSpeed configuration decides. Arguments as above."""
    parallel, config = recipe.parallel, deepspeed_config(recipe)
    zero = config["zero_optimization"]
    assert recipe.model.vocabulary is not None
    away = {key: (zero.get(f"offload_{key}") or {}).get("device", "none") != "none" for key in ("param", "optimizer")}
    offload: Offload = "all" if away["param"] else "optimizer" if away["optimizer"] else "none"
    return Job(
        shape=llama(recipe.model, recipe.batch.sequence_length, recipe.precision, layout.context),
        layout=layout,
        micro_samples=recipe.batch.micro_samples,
        zero=parallel.zero,
        gather=parallel.gather_policy,
        reduce=parallel.reduce_policy,
        recompute=parallel.recompute,
        sequence_parallel=parallel.sequence,
        offload=offload,
        bucket_elements=int(zero["reduce_bucket_size"]),
        reduced_bytes={"fp32": 4, "bf16": 2, "fp16": 2}.get(config.get("communication_data_type") or ""),
        overlap_comm=bool(zero.get("overlap_comm", parallel.zero == 3)),
        max_live_elements=int(zero.get("stage3_max_live_parameters", 0)),
        prefetch_elements=int(zero.get("stage3_prefetch_bucket_size", 0)),
        padded_rows=vocabulary_rows(recipe.model.vocabulary, layout.tensor),
    )


def memory(job: Job) -> list[StageMemory]:
    """Memory of a step, one entry a pipeline rank."""
    return [_stage(job, rank) for rank in range(job.layout.pipeline)]


def worst_stage(job: Job) -> StageMemory:
    """The entry of `memory` with the largest total, without computing ranks that another one surpasses.

    Ranks later in the pipeline hold fewer micro-batches, so of those with equal layers the first is the worst; the
    first and the last rank of all hold embedding and head.
    """
    last = job.layout.pipeline - 1
    ranks, seen = [], set()
    for rank in range(last + 1):
        key = (tuple(job.chunk_layers(rank)), rank in (0, last))
        if key not in seen or rank == last:
            seen.add(key)
            ranks.append(rank)
    return max((_stage(job, rank) for rank in ranks), key=lambda stage: stage.total_bytes)


def _stage(job: Job, rank: int) -> StageMemory:
    static = _static(job, rank)
    layout, blocks = job.layout, block_moments(job)
    moments = [
        _operation(job, rank, static, load, blocks)
        for load in loads(layout.pipeline, rank, layout.num_micro_batches, layout.virtual_stages)
    ]
    moments += [_reduction(job, rank, static), _update(job, rank, static)]
    return max(moments, key=lambda stage: stage.total_bytes)


def _static(job: Job, rank: int) -> StageMemory:
    """What lies there between two steps."""
    w, share = job.shape.element_bytes, job.parameters(rank) / job.layout.zero_size
    parameters, gradients, buffers, masters, host = w * share, 0.0, 0.0, 12 * share, 12 * share
    if job.zero < 3:
        parameters *= job.layout.zero_size
    else:
        buffers = float((job.reduced_bytes or w) * job.bucket_elements)
        gradients = share * (4 if job.reduce == "microbatch" else w)
    if job.offload != "none":  # with the fp32 gradients that Adam reads there
        host += masters + 4 * share + (gradients if job.zero == 3 else 4 * share)
        masters = gradients = 0.0
    if job.offload == "all" and job.zero == 3:
        host, parameters = host + parameters, 0.0
    return StageMemory(rank, "update", 0, int(parameters), int(gradients), int(masters), 0, 0, int(buffers), int(host))


def _operation(job: Job, rank: int, static: StageMemory, load: Load, blocks: list[tuple[float, Moment]]) -> StageMemory:
    """At one forward or backward: of a backward, the worst of its head, its last norm and its first block."""
    layout, w = job.layout, job.shape.element_bytes
    last_chunk = rank == layout.pipeline - 1 and load.chunk == layout.virtual_stages - 1
    kept, sent = _kept(job, rank, load)
    common = replace(
        static,
        moment=load.kind,
        in_flight=sum(load.in_flight),
        parameters_bytes=int(static.parameters_bytes + _gathered(job, rank, last_chunk)),
        gradients_bytes=int(static.gradients_bytes + _running_gradients(job, rank, load)),
        activations_bytes=int(kept),
        buffers_bytes=int(static.buffers_bytes + sent),
    )
    logits = job.local_tokens * job.vocabulary_rows if last_chunk else 0
    if load.kind == "forward":
        return replace(common, logits_bytes=w * logits + 4 * min(logits, PART_ELEMENTS))
    bucket = w * job.bucket_elements if job.contiguous_gradients and job.reduce == "microbatch" and job.zero < 3 else 0
    bucket *= 1 + job.overlap_comm  # from the first gradient on

    def at(activations: float, weights: float = 0.0, logits: float = 0.0, reduced: float = 0.0) -> StageMemory:
        return replace(
            common,
            activations_bytes=int(kept + activations),
            gradients_bytes=int(common.gradients_bytes + w * weights),
            logits_bytes=int(logits),
            buffers_bytes=int(common.buffers_bytes + bucket + reduced),
        )

    done, copied = last_norm_bytes(job) if last_chunk else 0.0, _reduced_copy(job, job.bucket_elements, False)
    moments = [
        at(more - done, moment.weights / layout.tensor, reduced=copied if moment.reduced else 0.0)
        for more, moment in blocks
    ]
    moments.append(_first_bucket(job, rank, max(moments, key=lambda stage: stage.total_bytes), last_chunk))
    if last_chunk:
        head = job.vocabulary_rows * job.shape.hidden
        moments.append(at(copies_bytes(job, HEAD_COPIES), head, w * logits))
        if head > job.bucket_elements:  # it waits for the last norm's gradient, and is reduced on its own
            moments.append(at(stream_bytes(job) - done, head, reduced=_reduced_copy(job, head, True)))
        moments.append(at(moment_bytes(job, job.shape.last_norm_moment)))
    return max(moments, key=lambda stage: stage.total_bytes)


def _gathered(job: Job, rank: int, last_chunk: bool) -> float:
    """ZeRO-3: parameters gathered while the schedule runs.

    `gather: microbatch`: a block, and what the prefetcher has gathered ahead: it stops at its bucket or at the limit of
    live parameters, with the parameter that passes it.
    """
    shape, tensor, count = job.shape, job.layout.tensor, job.parameters(rank)
    if job.zero < 3 or job.layout.zero_size == 1:
        return 0.0
    if job.gather == "step":
        return float(shape.element_bytes * count)
    block = shape.block.matrix_parameters / tensor + shape.block.replicated_parameters
    head = job.vocabulary_rows * shape.hidden if last_chunk else 0
    ahead = min(job.max_live_elements, block + job.prefetch_elements) + max(shape.largest_matrix / tensor, head)
    return shape.element_bytes * min(count, ahead)


def _kept(job: Job, rank: int, load: Load) -> tuple[float, float]:
    """Bytes kept for backwards, and bytes of hidden states' gradients sent and not yet known to be received.

    A chunk keeps what it received, the input of its first block, and what it sent; the gradient that comes back says
    that this was received. Of what it sends back one is on its way: what comes of the next micro-batch says so of the
    one before.
    """
    layout, layers, stream, block = job.layout, job.chunk_layers(rank), stream_bytes(job), activation_bytes(job)
    kept = sent = 0.0
    for chunk, flights in enumerate(load.in_flight):
        stage = chunk * layout.pipeline + rank
        first, last = stage == 0, stage == len(layout.stages) - 1
        kept += flights * (layers[chunk] * block + (last_norm_bytes(job) if last else stream))
        if not first:
            sent += stream * min(load.backwards[chunk], 1)
    return kept, sent


def _running_gradients(job: Job, rank: int, load: Load) -> float:
    """Gradients of the micro-batches whose backwards are done, beyond what lies there between steps."""
    started = sum(done > 0 for done in load.backwards) / len(load.backwards)
    if job.reduce == "step":
        return 4.0 * job.parameters(rank) * started
    return 4.0 * _summed(job, rank) * started if job.zero < 3 and job.offload == "none" else 0.0


def _summed(job: Job, rank: int) -> float:
    """Elements of the partition's sum of gradients, ZeRO-2 with `reduce: microbatch`.

    In fp32 it is made of whole gradients, also of the parameters that the partition's two ends cut: on average as much
    beyond the ends as one parameter has.
    """
    data = job.layout.zero_size
    cut = job.shape.largest_matrix / job.layout.tensor if job.shape.element_bytes == 4 and data > 1 else 0.0
    return job.parameters(rank) / data + cut


def _reduced_copy(job: Job, elements: float, alone: bool) -> float:
    """Bytes of the copy that `reduce: microbatch` makes of gradients: in the type in which they are reduced, and for
    ZeRO-3, unless one is alone, in the order of partitions.
    """
    if job.reduce == "step":
        return 0.0
    reduced = job.reduced_bytes or job.shape.element_bytes
    as_it_is = reduced == job.shape.element_bytes and (job.zero < 3 or alone)
    return 0.0 if as_it_is else reduced * elements


def _first_bucket(job: Job, rank: int, inside: StageMemory, last_chunk: bool) -> StageMemory:
    """ZeRO-2 in fp32 collects each backward's partition beside the sum of those before, from its first full bucket on.

    The blocks whose gradients filled that bucket have let go of their activations.
    """
    if job.zero != 2 or job.reduce != "microbatch" or job.shape.element_bytes != 4:
        return inside
    block, tensor = job.shape.block, job.layout.tensor
    behind = job.bucket_elements - (job.vocabulary_rows * job.shape.hidden if last_chunk else 0)
    blocks = max(0, behind) / (block.matrix_parameters / tensor + block.replicated_parameters)
    released = min(float(inside.activations_bytes), activation_bytes(job) * blocks)
    return replace(
        inside,
        activations_bytes=int(inside.activations_bytes - released),
        gradients_bytes=int(inside.gradients_bytes + 4 * _summed(job, rank)),
    )


def _reduction(job: Job, rank: int, static: StageMemory) -> StageMemory:
    """After the schedule, `reduce: step`: whole gradients and, under bf16, their fp32 sums."""
    w, count = job.shape.element_bytes, job.parameters(rank)
    if job.reduce != "step":
        return replace(static, moment="reduction")
    gathered = w * count if job.zero == 3 and job.layout.zero_size > 1 else 0
    gradients = count * (4 if w == 4 else 6)
    _, sent = _kept(job, rank, loads(*_key(job, rank))[-1])
    buckets = w * min(job.bucket_elements, count)
    return replace(
        static,
        moment="reduction",
        parameters_bytes=static.parameters_bytes + gathered,
        gradients_bytes=int(static.gradients_bytes + gradients),
        buffers_bytes=int(static.buffers_bytes + sent + (buckets if w == 4 else 0)),
    )


def _key(job: Job, rank: int) -> tuple[int, int, int, int]:
    return job.layout.pipeline, rank, job.layout.num_micro_batches, job.layout.virtual_stages


def _update(job: Job, rank: int, static: StageMemory) -> StageMemory:
    """The optimizer's step: the partition's gradients flattened in fp32. AdamW is fused and has no temporaries."""
    if job.offload != "none":
        return static
    share = job.parameters(rank) / job.layout.zero_size
    w = job.shape.element_bytes
    step = min(share, SUB_GROUP_ELEMENTS) if job.zero == 3 else share
    reduced = 0.0 if job.zero == 3 else share * (4 if job.reduce == "microbatch" else w)
    # Flattened, and then in fp32; DeepSpeed's accumulator of ZeRO-2 is both already.
    flat = 0.0 if job.zero == 2 and job.reduce == "microbatch" and w == 2 else 4 * step
    if job.zero < 3 and job.reduce == "step" and w == 2:
        flat += w * step
    return replace(static, gradients_bytes=int(static.gradients_bytes + reduced + flat))
