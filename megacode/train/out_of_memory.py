"""What to say when memory runs out: what it holds, by the plan's formula, and what to change."""

import os

import torch

from megacode.plan.layout import Layout
from megacode.plan.memory import StageMemory, stage_memory
from megacode.recipe import Recipe

_CPU_ALLOCATOR = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device's or this machine's memory is used up."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in text for words in _CPU_ALLOCATOR)


def explain_out_of_memory(recipe: Recipe, layout: Layout, pipeline_rank: int, device: torch.device) -> str:
    """One line: what a rank of this stage holds at its worst moment, what there is, and what to change."""
    stage = stage_memory(recipe, layout)[pipeline_rank]
    there = _memory_bytes(device)
    names = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
    parts = {name: getattr(stage, f"{name}_bytes") for name in names}
    if device.type == "cpu":
        parts["checkpoints' copy and what is offloaded"] = stage.host_bytes
    held = ", ".join(f"{name} {_gib(value)}" for name, value in parts.items())
    return (
        f"out of memory; by the plan's formula a rank of stage {pipeline_rank} holds {_gib(sum(parts.values()))} "
        f"({held}) and there are {_gib(there)}; {mend(recipe, layout, stage)}"
    )


def mend(recipe: Recipe, layout: Layout, stage: StageMemory) -> str:
    """What to change, for the largest part first that can still be made smaller."""
    parallel = recipe.parallel
    activations = stage.activations_bytes + stage.logits_bytes
    blocks = activations if stage.activations_bytes >= stage.logits_bytes else 0
    again = {"none": "selective", "selective": "full"}.get(parallel.recompute)
    wider = f"raise parallel.tensor ({parallel.tensor}) or parallel.pipeline ({parallel.pipeline})"
    length = f"lower batch.sequence_length ({recipe.batch.sequence_length})"
    choices = [
        (activations, recipe.batch.micro_samples > 1, f"lower batch.micro_samples ({recipe.batch.micro_samples})"),
        (blocks, parallel.tensor > 1 and not parallel.sequence, "set parallel.sequence: true"),
        (blocks, again is not None, f"set parallel.recompute: {again}"),
        (activations, True, f"raise parallel.context ({parallel.context}), {length}, or {wider}"),
        (stage.optimizer_bytes, layout.zero_size == 1, f"take more data ranks, or {wider}"),
        (stage.gradients_bytes, parallel.zero == 1, "set parallel.zero: 2"),
        (stage.gradients_bytes, parallel.reduce_policy == "step", "set parallel.reduce: microbatch"),
        (stage.parameters_bytes, parallel.zero < 3, "set parallel.zero: 3"),
        (stage.parameters_bytes, parallel.gather_policy == "step", "set parallel.gather: microbatch"),
        (stage.parameters_bytes, True, f"{wider}, or take deepspeed_config: ds_configs/zero3_offload.json"),
    ]
    possible = [(size, text) for size, can, text in choices if can]
    return max(possible, key=lambda choice: choice[0])[1]


def _memory_bytes(device: torch.device) -> int:
    """Memory of the device; for a CPU the machine's, which all its ranks share."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"
