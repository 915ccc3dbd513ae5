"""Which layouts of a recipe fit a number of devices, which is the quickest, and why the others do not."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.plan.cost import Cost
from megacode.plan.hardware import Hardware
from megacode.plan.layout import fit
from megacode.plan.memory import StageMemory, recipe_job, worst_stage
from megacode.plan.units import size
from megacode.recipe import Recipe, Recompute

VIRTUAL_STAGES = (1, 2, 4)
MICRO_SAMPLES = (1, 2, 4, 8)
POLICIES: tuple[tuple[int, str | None, str | None], ...] = (
    (1, None, None),
    (2, None, "microbatch"),
    (2, None, "step"),
    (3, "step", "microbatch"),
    (3, "step", "step"),
    (3, "microbatch", "microbatch"),
    (3, "microbatch", "step"),
)
"""zero, gather, reduce."""
LARGEST_TENSOR = 16
CONTEXTS = (1, 2, 4, 8)
LEAST_CONTEXT_TOKENS = 4096
"""Of a sequence on a context rank: with fewer, the gathers of keys and values are not worth it."""
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Choice:
    """A layout that a recipe can say, with what it needs and takes."""

    changes: dict[str, Any]
    """Sections and keys of the recipe."""
    worst: StageMemory
    cost: Cost


@dataclass
class Rejection:
    """Layouts that can't be, for one reason."""

    reason: str
    """Of the example."""
    example: str
    needs_bytes: int = 0
    """Memory of the example, where that is the reason."""
    count: int = 0


@dataclass
class Search:
    """What a search finds."""

    fitting: list[Choice] = field(default_factory=list)
    """The quickest first."""
    rejected: dict[str, Rejection] = field(default_factory=dict)

    def reject(self, kind: str, reason: str, changes: dict[str, Any], needs_bytes: int = 0) -> None:
        """Count a layout under its kind of reason; the one that needs least is kept as the example."""
        known = self.rejected.get(kind)
        if known is None or needs_bytes < known.needs_bytes:
            count = known.count if known else 0
            known = self.rejected[kind] = Rejection(reason, describe(changes), needs_bytes, count)
        known.count += 1


def search(recipe: Recipe, num_devices: int, limit_bytes: float, hardware: Hardware) -> Search:
    """All layouts that a recipe can say today, its global batch kept; those that fit, the quickest first.

    Offload is tried only where nothing fits without, and of recomputation what makes a layout fit and no more: it saves
    memory and nothing else. Of layouts equal in time and memory one is kept.
    """
    found = Search()
    for offload in (False, True):
        for changes in _candidates(recipe, num_devices, offload):
            _try(recipe, changes, num_devices, limit_bytes, hardware, found)
        if found.fitting:
            break
    unlike = {(choice.cost.seconds.total, choice.worst.total_bytes): choice for choice in reversed(found.fitting)}
    found.fitting = [unlike[key] for key in sorted(unlike)]
    return found


def shareable(recipe: Recipe, num_devices: int) -> bool:
    """Whether a layout fits a number of devices, whatever memory it needs."""
    for tensor in _divisors(num_devices, LARGEST_TENSOR):
        for pipeline in _divisors(num_devices // tensor, recipe.model.layers):
            for axes in _axes(recipe, tensor, pipeline, num_devices // (tensor * pipeline)):
                if axes["virtual_stages"] > 1 or axes["sequence"]:  # such a layout fits without as well
                    continue
                with suppress(UserError):
                    fit(apply(recipe, {"parallel": axes, "batch": {"micro_samples": 1}}), num_devices)
                    return True
    return False


def apply(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with some keys changed; what `changes` holds is valid by construction."""
    update: dict[str, Any] = {}
    for key, value in changes.items():
        update[key] = getattr(recipe, key).model_copy(update=value) if isinstance(value, dict) else value
    return recipe.model_copy(update=update)


def describe(changes: dict[str, Any]) -> str:
    """A layout in a line, with the recipe's own words."""
    words = []
    for key, value in changes.items():
        pairs = value.items() if isinstance(value, dict) else [(key, value)]
        for name, text in pairs:
            if text is True:
                words.append(name)
            elif text and text != "none" and (name, text) != ("context", 1):
                words.append(f"{name} {Path(text).name if name == 'deepspeed_config' else text}")
    return " ".join(words)


def mend(recipe: Recipe, num_devices: int, limit_bytes: float) -> str:
    """What to change where a recipe's own layout does not fit: the first single change that does, else what is big."""
    worst = _evaluate(recipe, {}, num_devices)
    for changes in _small_changes(recipe):
        try:
            stage = _evaluate(recipe, changes, num_devices)
        except UserError:
            continue
        if stage.total_bytes <= limit_bytes:
            return f"set {describe(changes)} ({size(stage.total_bytes)})"
    return f"no single change is enough ({_largest(worst)}): use --search, more GPUs or offload"


def _evaluate(recipe: Recipe, changes: dict[str, Any], num_devices: int) -> StageMemory:
    changed = apply(recipe, changes)
    return worst_stage(recipe_job(changed, fit(changed, num_devices)))


def _small_changes(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Single changes, those that cost least time first."""
    parallel, batch = recipe.parallel, recipe.batch
    for micro in (4, 2, 1):
        if micro < batch.micro_samples:
            yield {"batch": {"micro_samples": micro}}
    if parallel.tensor > 1 and not parallel.sequence:
        yield {"parallel": {"sequence": True}}
    for zero, gather, reduce in POLICIES:
        deepspeed = _deepspeed(recipe, zero, False)
        if zero >= parallel.zero and deepspeed is not None:
            yield {"parallel": {"zero": zero, "gather": gather, "reduce": reduce}, **deepspeed}
    for recompute in RECOMPUTE[RECOMPUTE.index(parallel.recompute) + 1 :]:
        yield {"parallel": {"recompute": recompute}}
    for factor in (2, 4, 8):
        yield {"parallel": {"tensor": parallel.tensor * factor}}
    for factor in (2, 4, 8):
        pipeline = parallel.pipeline * factor
        yield {"parallel": {"pipeline": pipeline, **_stages(recipe, pipeline, parallel.virtual_stages)}}
    for factor in (2, 4, 8):
        yield {"parallel": {"context": parallel.context * factor}}


def _candidates(recipe: Recipe, num_devices: int, offload: bool) -> Iterator[dict[str, Any]]:
    """All but recomputation."""
    for tensor in _divisors(num_devices, LARGEST_TENSOR):
        for pipeline in _divisors(num_devices // tensor, recipe.model.layers):
            for axes in _axes(recipe, tensor, pipeline, num_devices // (tensor * pipeline)):
                for micro in MICRO_SAMPLES:
                    for zero, gather, reduce in POLICIES:
                        deepspeed = _deepspeed(recipe, zero, offload)
                        if deepspeed is None:
                            continue
                        yield {
                            "parallel": {**axes, "zero": zero, "gather": gather, "reduce": reduce},
                            "batch": {"micro_samples": micro},
                            **deepspeed,
                        }


def contexts(recipe: Recipe) -> list[int]:
    """Numbers of context ranks that are tried."""
    length = recipe.batch.sequence_length
    return sorted({c for c in CONTEXTS if c == 1 or length // c >= LEAST_CONTEXT_TOKENS} | {recipe.parallel.context})


def _axes(recipe: Recipe, tensor: int, pipeline: int, replicas: int) -> Iterator[dict[str, Any]]:
    """How `replicas` x tensor x pipeline ranks can share the model and the sequences."""
    for context in contexts(recipe):
        if replicas % context:
            continue
        for virtual in VIRTUAL_STAGES if pipeline > 1 else (1,):
            for sequence in (False, True) if tensor > 1 else (False,):
                yield {
                    "tensor": tensor, "sequence": sequence, "context": context, "pipeline": pipeline,
                    "virtual_stages": virtual, **_stages(recipe, pipeline, virtual),
                }  # fmt: skip


def _stages(recipe: Recipe, pipeline: int, virtual: int) -> dict[str, Any]:
    """Stages given by hand are those of one number of stages."""
    stages = recipe.parallel.stages
    return {"stages": "even"} if isinstance(stages, list) and len(stages) != pipeline * virtual else {}


def _divisors(number: int, largest: int) -> list[int]:
    return [i for i in range(1, min(number, largest) + 1) if number % i == 0]


@lru_cache
def sibling(own: str | None, name: str) -> str | None:
    """A DeepSpeed file beside the recipe's own (in ds_configs/ where it has none), if there is one."""
    file = (Path(own).parent if own else Path("ds_configs")) / name
    return str(file) if file.is_file() else None


def _deepspeed(recipe: Recipe, zero: int, offload: bool) -> dict[str, Any] | None:
    """The change of deepspeed_config that goes with a ZeRO stage; None: there is no file for it."""
    own = recipe.deepspeed_config
    if offload:
        file = sibling(own, "zero3_offload.json") if zero == 3 else None
        return {"deepspeed_config": file} if file is not None and file != own else None
    if own is None or zero == recipe.parallel.zero:
        return {}
    file = sibling(own, f"zero{zero}.json")
    return {"deepspeed_config": file} if file is not None else None


def _try(
    recipe: Recipe, changes: dict[str, Any], num_devices: int, limit_bytes: float, hardware: Hardware, found: Search
) -> None:
    """With the least recomputation that makes it fit, if any does."""
    for recompute in RECOMPUTE:
        changes = {**changes, "parallel": {**changes["parallel"], "recompute": recompute}}
        changed = apply(recipe, changes)
        try:
            layout = fit(changed, num_devices)
            job = recipe_job(changed, layout)
        except UserError as error:
            found.reject(re.sub(r"[\d.]+", "", str(error)), str(error), changes)
            return
        worst = worst_stage(job)
        if worst.total_bytes <= limit_bytes:
            found.fitting.append(Choice(changes, worst, Cost(job, hardware)))
            return
    where = f"tensor {layout.tensor} pipeline {layout.pipeline}"
    where += f" context {layout.context}" if layout.context > 1 else ""
    need = f"the nearest needs {size(worst.total_bytes)} on stage {worst.pipeline_rank}"
    found.reject(f"memory {where}", f"{where}: {need}; {_largest(worst)}", changes, worst.total_bytes)


def _largest(stage: StageMemory) -> str:
    """The largest part of a stage's memory, and what lowers it."""
    parts = {
        "masters and moments": (stage.optimizer_bytes, "raise tensor, pipeline or the data ranks"),
        "parameters": (stage.parameters_bytes, "raise tensor or pipeline"),
        "gradients": (stage.gradients_bytes, "raise tensor or pipeline, or take reduce: microbatch"),
        "activations": (stage.activations_bytes, "lower micro_samples or raise tensor or context"),
        "logits": (stage.logits_bytes, "lower micro_samples or raise tensor"),
        "buffers": (
            stage.buffers_bytes,
            "raise the data ranks: fewer micro-batches a step are sent",
        ),
    }
    name, (num_bytes, change) = max(parts.items(), key=lambda part: part[1][0])
    return f"{size(num_bytes)} are {name}; {change}"
