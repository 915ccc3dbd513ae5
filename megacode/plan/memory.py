"""How many bytes each pipeline rank's devices hold at the worst moment of a step. Formulas and sources: docs/plan.md.

Bytes of tensors: a CUDA context, fragmentation and what NCCL allocates come on top.

A rank's micro-batches in flight are counted by walking the very list of operations that it will run. Four kinds of
moments are compared: a forward, a backward, the reduction after the schedule (`reduce: step`), the optimizer's update.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from megacode.engine.config import deepspeed_config
from megacode.parallel.schedule import one_f_one_b
from megacode.parallel.timeline import in_flight
from megacode.plan.job import Job, Offload
from megacode.plan.layout import Layout, vocabulary_rows
from megacode.plan.shape import llama
from megacode.recipe import Recipe, Recompute

SUB_GROUP_ELEMENTS = 10**9
"""DeepSpeed's sub_group_size: ZeRO-3 updates so many elements of its partition at a time."""

Moment = Literal["forward", "backward", "reduction", "update"]


@dataclass(frozen=True)
class StageMemory:
    """What a device of one pipeline rank holds at its worst moment."""

    pipeline_rank: int
    moment: Moment
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
    """Logits of one micro-batch with their fp32 copies and gradients."""
    buffers_bytes: int
    """DeepSpeed's buckets, hidden states on their way to other stages."""
    host_bytes: int
    """In the host's memory, for each device: what is offloaded."""

    @property
    def total_bytes(self) -> int:
        """On the device."""
        states = self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes
        return states + self.activations_bytes + self.logits_bytes + self.buffers_bytes


def stage_memory(
    recipe: Recipe,
    layout: Layout,
    *,
    recompute: Recompute | None = None,
    sequence_parallel: bool | None = None,
) -> list[StageMemory]:
    """Memory of a recipe's step in a layout, one entry a pipeline rank.

    Args:
        recipe: with model.vocabulary filled in.
        layout: what `layout.fit` gives for it.
        recompute: another than the recipe's.
        sequence_parallel: another than the recipe's.
    """
    return memory(recipe_job(recipe, layout, recompute, sequence_parallel))


def recipe_job(
    recipe: Recipe,
    layout: Layout,
    recompute: Recompute | None = None,
    sequence_parallel: bool | None = None,
) -> Job:
    """A recipe's step as the formulas see it, with what its DeepSpeed configuration decides. Arguments as above."""
    parallel, config = recipe.parallel, deepspeed_config(recipe)
    zero = config["zero_optimization"]
    assert recipe.model.vocabulary is not None
    away = {key: (zero.get(f"offload_{key}") or {}).get("device", "none") != "none" for key in ("param", "optimizer")}
    offload: Offload = "all" if away["param"] else "optimizer" if away["optimizer"] else "none"
    return Job(
        shape=llama(recipe.model, recipe.batch.sequence_length, recipe.precision),
        layout=layout,
        micro_samples=recipe.batch.micro_samples,
        zero=parallel.zero,
        gather=parallel.gather_policy,
        reduce=parallel.reduce_policy,
        recompute=parallel.recompute if recompute is None else recompute,
        sequence_parallel=parallel.sequence if sequence_parallel is None else sequence_parallel,
        offload=offload,
        bucket_elements=int(zero["reduce_bucket_size"]),
        reduced_bytes={"fp32": 4, "bf16": 2, "fp16": 2}.get(config.get("communication_data_type") or ""),
        overlap_comm=bool(zero.get("overlap_comm", parallel.zero == 3)),
        max_live_elements=int(zero.get("stage3_max_live_parameters", 0)),
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


def activation_bytes(job: Job, layers: int = 1) -> float:
    """What one micro-batch's forward through some blocks keeps on one device (Korthikanti et al. 2022, section 4)."""
    tensor, token_bytes = job.layout.tensor, 0.0
    for saved in job.shape.block.saved:
        if job.recompute in saved.kept:
            token_bytes += saved.token_bytes / (tensor if saved.split or job.sequence_parallel else 1)
    return layers * job.local_tokens * token_bytes


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


def _stage(job: Job, rank: int) -> StageMemory:
    static = _static(job, rank)
    layout = job.layout
    moments = [
        _operation(job, rank, static, load)
        for load in loads(layout.pipeline, rank, layout.num_micro_batches, layout.virtual_stages)
    ]
    moments += [_reduction(job, rank, static), _update(job, rank, static)]
    return max(moments, key=lambda stage: stage.total_bytes)


def _static(job: Job, rank: int) -> StageMemory:
    """What lies there between two steps."""
    w, share = job.shape.element_bytes, job.parameters(rank) / job.layout.zero_size
    parameters, gradients, buffers, masters, host = w * share, 0.0, 0.0, 12 * share, 0.0
    if job.zero < 3:
        parameters *= job.layout.zero_size
    else:
        buffers = float(w * job.bucket_elements)
        gradients = share * (4 if job.reduce == "microbatch" else w)
    if job.offload != "none":  # with the fp32 gradients that Adam reads there
        host = masters + 4 * share + (gradients if job.zero == 3 else 4 * share)
        masters = gradients = 0.0
    if job.offload == "all" and job.zero == 3:
        host, parameters = host + parameters, 0.0
    return StageMemory(rank, "update", 0, int(parameters), int(gradients), int(masters), 0, 0, int(buffers), int(host))


def _operation(job: Job, rank: int, static: StageMemory, load: Load) -> StageMemory:
    """At one forward or backward: of a backward, the worse of its loss and of its first block."""
    layout, shape = job.layout, job.shape
    w, count, tokens = shape.element_bytes, job.parameters(rank), job.local_tokens
    hidden = w * shape.hidden * tokens
    last_chunk = rank == layout.pipeline - 1 and load.chunk == layout.virtual_stages - 1
    kept, sent = _kept(job, rank, load)
    logits = tokens * shape.vocabulary / layout.tensor
    block = activation_bytes(replace(job, recompute="none")) if job.recompute != "none" else 0.0
    block += tokens * shape.block.backward_token_bytes / layout.tensor
    bucket = w * job.bucket_elements if job.contiguous_gradients and job.reduce == "microbatch" and job.zero < 3 else 0
    bucket *= 1 + job.overlap_comm
    largest = w * max(shape.largest_matrix / layout.tensor, job.vocabulary_rows * shape.hidden if last_chunk else 0)
    gradients = static.gradients_bytes + _running_gradients(job, rank, load)
    gathered = 0.0
    if job.zero == 3 and layout.zero_size > 1:
        limit = job.max_live_elements + largest / w if job.gather == "microbatch" else count
        gathered = w * min(count, limit)
    common = replace(
        static,
        moment=load.kind,
        in_flight=sum(load.in_flight),
        parameters_bytes=int(static.parameters_bytes + gathered),
        gradients_bytes=int(gradients),
        activations_bytes=int(kept),
        buffers_bytes=int(static.buffers_bytes + sent),
    )
    if load.kind == "forward":
        return replace(common, logits_bytes=int(logits * (8 if w == 4 else 10)) if last_chunk else 0)
    # Softmax kept, its copy or gradient, and (ours split: bf16, plain: fp32) what becomes the gradient of the logits.
    loss = (12 if layout.tensor == 1 else 8 if w == 4 else 10) * logits if last_chunk else 0
    inside = replace(
        common,
        activations_bytes=int(kept + block),
        gradients_bytes=int(gradients + largest),
        buffers_bytes=int(static.buffers_bytes + sent + bucket),
    )
    filling = _first_bucket(job, rank, inside, last_chunk)
    at_loss = replace(common, logits_bytes=int(loss), activations_bytes=int(kept + (0 if last_chunk else hidden)))
    return max(inside, filling, at_loss, key=lambda stage: stage.total_bytes)


def _kept(job: Job, rank: int, load: Load) -> tuple[float, float]:
    """Bytes kept for backwards, and bytes of hidden states sent and not yet known to be received.

    What comes back says so: before the first backward nothing does, afterwards two in each direction are on their way.
    """
    shape, layout = job.shape, job.layout
    w, tokens, layers = shape.element_bytes, job.local_tokens, job.chunk_layers(rank)
    hidden = w * shape.hidden * tokens
    norm = tokens * shape.hidden * (12 if w == 4 else 8)
    kept = sent = 0.0
    for chunk, flights in enumerate(load.in_flight):
        stage = chunk * layout.pipeline + rank
        first, last = stage == 0, stage == len(layout.stages) - 1
        one = activation_bytes(job, layers[chunk]) + (norm if last else 0)
        if not first and (w == 2 and job.recompute != "full"):
            one += hidden  # the received input; under fp32 the first norm keeps the same tensor
        kept += flights * one
        ahead = load.forwards[chunk] if sum(load.backwards) == 0 and load.kind == "forward" else 2
        sent += 0 if last else hidden * min(load.forwards[chunk], ahead)
        sent += 0 if first else hidden * min(load.backwards[chunk], 2)
    return kept, sent


def _running_gradients(job: Job, rank: int, load: Load) -> float:
    """Gradients of the micro-batches whose backwards are done, beyond what lies there between steps."""
    count, data = job.parameters(rank), job.layout.zero_size
    started = sum(done > 0 for done in load.backwards) / len(load.backwards)
    if job.reduce == "step":
        return 4.0 * count * started
    return 4.0 * count / data * started if job.zero < 3 and job.offload == "none" else 0.0


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
        gradients_bytes=int(inside.gradients_bytes + 4 * job.parameters(rank) / job.layout.zero_size),
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
    flat = 0.0 if job.zero == 2 and job.reduce == "microbatch" and w == 2 else 4 * step
    return replace(static, gradients_bytes=int(static.gradients_bytes + reduced + flat))
