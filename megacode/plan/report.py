"""What `megacode plan` says, as data: of a recipe's own layout, of the policies it could take, the recipe to write."""

import os
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml

from megacode import recipe as recipes
from megacode.errors import UserError
from megacode.plan.communication import Exchange, exchanges
from megacode.plan.cost import Cost, Seconds
from megacode.plan.hardware import Hardware
from megacode.plan.job import Job, Offload
from megacode.plan.memory import StageMemory, memory, worst_stage
from megacode.plan.model import flops_per_token, num_parameters
from megacode.plan.search import RECOMPUTE, Search, describe
from megacode.plan.units import GIB
from megacode.recipe import Recipe

Policy = Literal["step", "microbatch"]


def layout_report(recipe: Recipe, job: Job, hardware: Hardware, limit_bytes: float) -> dict[str, Any]:
    """Of one layout: memory by stage, policies, bubble, collectives, and the step's time with its parts."""
    stages, cost = memory(job), Cost(job, hardware)
    worst = max(stages, key=lambda stage: stage.total_bytes)
    per_device = cost.tokens_per_second / job.layout.world_size
    layout = asdict(job.layout)
    layout["stages"] = [[stage.start, stage.stop] for stage in job.layout.stages]
    return {
        "fits": worst.total_bytes <= limit_bytes,
        "parameters": num_parameters(recipe.model),
        "layout": layout,
        "worst_stage": worst.pipeline_rank,
        "worst_gib": worst.total_bytes / GIB,
        "stages": [stage_row(job, stage) for stage in stages],
        "policies": policy_rows(job, limit_bytes),
        "bubble": cost.bubble,
        "exchanges": [
            exchange_row(exchange) for exchange in exchanges(job, cost.slowest) if exchange.kind != "receive"
        ],
        "step_seconds": cost.seconds.total,
        "parts_seconds": {field.name: getattr(cost.seconds, field.name) for field in fields(Seconds)},
        "tokens_per_second": cost.tokens_per_second,
        "tokens_per_second_per_device": per_device,
        "mfu": per_device * flops_per_token(recipe.model, job.shape.sequence) / (hardware.peak_teraflops * 1e12),
    }


def exchange_row(exchange: Exchange) -> dict[str, Any]:
    """Calls and bytes of one kind of communication of a rank; where DeepSpeed decides, the most that there can be."""
    return {
        "name": f"{exchange.axis}: {exchange.kind} of {exchange.name}",
        "calls": exchange.calls,
        "most_calls": exchange.most_calls or exchange.calls,
        "sent_bytes": exchange.sent_bytes,
    }


def stage_row(job: Job, stage: StageMemory) -> dict[str, Any]:
    """One pipeline rank's memory in GiB."""
    row = {"stage": stage.pipeline_rank, "layers": sum(job.chunk_layers(stage.pipeline_rank)), "moment": stage.moment}
    row["in_flight"] = stage.in_flight
    for field in fields(stage):
        if field.name.endswith("_bytes"):
            row[field.name.replace("_bytes", "_gib")] = getattr(stage, field.name) / GIB
    return {**row, "total_gib": stage.total_bytes / GIB}


def policy_rows(job: Job, limit_bytes: float) -> list[dict[str, Any]]:
    """GiB of the worst stage under each policy of gather, reduce, recomputation and offload, without and with sequence
    parallelism.
    """
    gathers: tuple[Policy, ...] = ("step", "microbatch") if job.zero == 3 else ("step",)
    reduces: tuple[Policy, ...] = ("microbatch", "step") if job.zero > 1 else ("step",)
    offloads: tuple[Offload, ...] = ("none", "all") if job.zero == 3 else ("none",)
    sequences = (False, True) if job.layout.tensor > 1 else (False,)
    rows = []
    for offload, gather, reduce, recompute in product(offloads, gathers, reduces, RECOMPUTE):
        changed = replace(job, gather=gather, reduce=reduce, recompute=recompute, offload=offload)
        needs = [worst_stage(replace(changed, sequence_parallel=sequence)) for sequence in sequences]
        rows.append(
            {
                "gather": gather if job.zero == 3 else None,
                "reduce": reduce,
                "recompute": recompute,
                "offload": offload,
                "gib": needs[0].total_bytes / GIB,
                "sequence_parallel_gib": needs[1].total_bytes / GIB if len(needs) > 1 else None,
                "host_gib": needs[0].host_bytes / GIB,
                "fits": min(need.total_bytes for need in needs) <= limit_bytes,
            }
        )
    return rows


def search_report(found: Search, num_devices: int) -> dict[str, Any]:
    """The layouts that fit, the quickest first, and the reasons of the others, the commonest first."""
    return {
        "fitting": [
            {
                "layout": describe(choice.changes),
                "changes": choice.changes,
                "worst_stage": choice.worst.pipeline_rank,
                "gib": choice.worst.total_bytes / GIB,
                "step_seconds": choice.cost.seconds.total,
                "bubble": choice.cost.bubble,
                "tokens_per_second": choice.cost.tokens_per_second,
                "tokens_per_second_per_device": choice.cost.tokens_per_second / num_devices,
            }
            for choice in found.fitting
        ],
        "rejected": [
            {"count": one.count, "reason": one.reason, "example": one.example}
            for one in sorted(found.rejected.values(), key=lambda one: -one.count)
        ],
    }


def write_recipe(file: Path, base: Path, chosen: Recipe) -> None:
    """Write a recipe that says `base` and only what differs from it; paths inside stay as the base has them.

    Raises:
        UserError: the file can't be written, or can't say the difference.
    """
    differing = _difference(recipes.load(base).model_dump(mode="json"), chosen.model_dump(mode="json"))
    link = os.path.relpath(base.resolve(), file.resolve().parent)
    try:
        file.write_text(yaml.safe_dump({"base": link, **differing}, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write: cannot write {file}: {error.strerror}") from None
    if recipes.load(file) != chosen:
        raise UserError(f"{file} can't say over its base that a top-level key is null; change {base} itself there")


def _difference(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            inner = _difference(base[key], value)
            found |= {key: inner} if inner else {}
        elif value != base.get(key):
            found[key] = value
    return found
