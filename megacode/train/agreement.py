"""What must be the same on all ranks, compared before it can do harm: hosts may have been given different files."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from megacode.data.source import Source
from megacode.engine.config import deepspeed_config
from megacode.engine.zero import local_shape
from megacode.errors import UserError
from megacode.parallel.heartbeat import waiting
from megacode.parallel.mesh import Mesh
from megacode.plan.layout import Layout
from megacode.recipe import Recipe
from megacode.train.metrics import package_versions
from megacode.train.verdict import spans

ABSENT = "absent"


def compare_starts(recipe: Recipe, layout: Layout, corpora: Mapping[str, Source]) -> None:
    """Compare recipes, layouts, versions and what the recipe's files hold. Collective over all ranks, before any mesh.

    Args:
        corpora: key of the recipe -> what it names.

    Raises:
        UserError: on every rank; names the first key that differs, and the ranks that have each value.
    """
    tokenizer = Path(recipe.tokenizer.path).read_bytes()
    facts: dict[str, Any] = {f"the version of {name}": version for name, version in package_versions().items()}
    facts |= _flat(recipe.model_dump(mode="json"))
    facts |= _flat({"the DeepSpeed configuration": deepspeed_config(recipe)})
    facts["the sha256 of tokenizer.path"] = hashlib.sha256(tokenizer).hexdigest()[:12]
    for key, each in corpora.items():
        facts[f"the number of tokens of {key}"] = each.num_tokens
        facts[f"the sha256 of {key}"] = each.identity[:12]
    facts |= _flat({"the layout": {**asdict(layout), "stages": [len(stage) for stage in layout.stages]}})
    text = _compare(facts, group=0)
    if text is not None:
        raise UserError(f"{text}; give all hosts the same recipe, overrides, files and packages")


def compare_parameters(parameters: Mapping[str, nn.Parameter], mesh: Mesh) -> None:
    """Compare names, shapes and dtypes of parameters between ranks that must hold the same. Collective over all ranks.

    Raises:
        UserError: on every rank; as `compare_starts`.
    """
    facts = {name: f"{tuple(local_shape(each))} {each.dtype}" for name, each in parameters.items()}
    facts["the order of parameters"] = hashlib.sha256("\n".join(parameters).encode()).hexdigest()[:12]
    text = _compare(facts, group=mesh.pipeline_rank * mesh.tensor + mesh.tensor_rank)
    if text is not None:
        raise UserError(f"{text} of its data ranks; install the same megacode on all hosts")


def _compare(facts: dict[str, Any], group: int) -> str | None:
    """What differs among the ranks that name the same group, if anything; the same answer on every rank."""
    lines = sorted(f"{key}: {value}" for key, value in facts.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    digests: list[tuple[int, str]] = _gather((group, digest))
    if len(set(digests)) == len({number for number, _ in digests}):
        return None
    everyone = _gather((group, facts))
    for number in sorted({number for number, _ in digests}):
        members = {rank: theirs for rank, (other, theirs) in enumerate(everyone) if other == number}
        if (text := difference(members)) is not None:
            return text
    raise AssertionError("digests differ and no fact does")


def _gather(value: Any) -> list[Any]:
    collected: list[Any] = [None] * dist.get_world_size()
    with waiting("all-gather", "world"):
        dist.all_gather_object(collected, value)
    return collected


def difference(facts: Mapping[int, Mapping[str, Any]]) -> str | None:
    """The first key that is not the same on all ranks: "optimizer.clip is 0.5 on rank 3 and 1.0 on the others".

    Args:
        facts: of each rank.
    """
    keys = dict.fromkeys(key for each in facts.values() for key in each)
    for key in keys:
        values = {rank: str(each.get(key, ABSENT)) for rank, each in facts.items()}
        (most, _), *rest = Counter(values.values()).most_common()
        if rest:
            shown = [
                f"{value} on {spans(rank for rank, theirs in values.items() if theirs == value)}" for value, _ in rest
            ]
            return f"{key} is {', '.join(shown)} and {most} on the others"
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections within sections as key.path -> value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
