"""The layout that is nearest to a recipe's own and fits the processes there are, or why there is none."""

import dataclasses
from typing import Any

from megacode.errors import UserError
from megacode.plan.hardware import Hardware
from megacode.plan.layout import fit
from megacode.plan.search import Choice, Search, apply, contexts, search, shareable
from megacode.plan.units import size
from megacode.recipe import Recipe

_TRIED = 3
"""Smaller numbers of nodes whose memory is looked at: a search that finds something takes seconds."""


@dataclasses.dataclass(frozen=True)
class Places:
    """The processes that a user asks for.

    Attributes:
        nodes: Machines.
        tasks: Processes of each.
        option: what the user calls those: gpus-per-node or tasks-per-node.
    """

    nodes: int
    tasks: int
    option: str

    def __str__(self) -> str:
        return f"--nodes {self.nodes} x --{self.option} {self.tasks} = {self.nodes * self.tasks} processes"


def nearest(recipe: Recipe, places: Places, limit_bytes: float, hardware: Hardware) -> tuple[dict[str, Any], str]:
    """What to change of the recipe, and why: `parallel` as little as can be, and of such layouts the quickest.

    Args:
        recipe: with its vocabulary.
        limit_bytes: memory of a device that may be used; infinite for CPUs.

    Raises:
        UserError: no layout fits; says why in keys of the recipe, and which number of nodes would do.
    """
    num_processes = places.nodes * places.tasks
    try:
        fit(recipe, num_processes)
    except UserError as error:
        reason = str(error)
    else:
        return {}, ""
    hardware = dataclasses.replace(hardware, devices_per_node=places.tasks)
    found = search(recipe, num_processes, limit_bytes, hardware)
    if not found.fitting:
        if shareable(recipe, num_processes):
            raise UserError(f"no layout fits {places}: {_memory(found, limit_bytes)}")
        fewer = _fewer_nodes(recipe, places, limit_bytes, hardware)
        raise UserError(f"no layout fits {places}: {_shares(recipe)}; {fewer}")

    def distance(choice: Choice) -> tuple[int, int]:
        keys = differences(recipe, choice.changes)
        return sum(key.startswith("parallel.") for key in keys), len(keys)

    return min(found.fitting, key=distance).changes, reason


def _memory(found: Search, limit_bytes: float) -> str:
    least = min((each for each in found.rejected.values() if each.needs_bytes), key=lambda each: each.needs_bytes)
    return (
        f"the one that needs least memory ({least.example}) takes {size(least.needs_bytes)} of {size(limit_bytes)} a "
        f"GPU; take more nodes, another --device, or a smaller batch.sequence_length"
    )


def _shares(recipe: Recipe) -> str:
    """What the number of processes would have to be a product of."""
    model, numbers = recipe.model, contexts(recipe)
    context = f", and context ranks ({', '.join(map(str, numbers))})" if len(numbers) > 1 else ""
    return (
        f"they must be a product of data ranks, which divide batch.global_samples ({recipe.batch.global_samples}), "
        f"tensor ranks, which divide model.heads ({model.heads}), model.kv_heads ({model.kv_heads}) and model.ffn "
        f"({model.ffn}), and pipeline ranks, at most model.layers ({model.layers}){context}"
    )


def _fewer_nodes(recipe: Recipe, places: Places, limit_bytes: float, hardware: Hardware) -> str:
    """The mend: the largest smaller number of nodes that a layout fits."""
    numbers = [n for n in range(places.nodes - 1, 0, -1) if shareable(recipe, n * places.tasks)]
    for nodes in numbers[:_TRIED]:
        if search(recipe, nodes * places.tasks, limit_bytes, hardware).fitting:
            return f"--nodes {nodes} is the largest smaller number that fits"
    if numbers:
        return "change these, or the number of nodes"
    return f"no smaller number of nodes does; give another --{places.option}, or change these"


def differences(recipe: Recipe, changes: dict[str, Any]) -> list[str]:
    """The keys that changes alter, as `key.path old -> new`."""
    before, after = (_dump(each) for each in (recipe, apply(recipe, changes)))
    lines = []
    for key, value in changes.items():
        names = [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
        for path in names:
            section, _, name = path.partition(".")
            old, new = (values[section][name] if name else values[section] for values in (before, after))
            if old != new:
                lines.append(f"{path} {_word(old)} -> {_word(new)}")
    return lines


def _dump(recipe: Recipe) -> dict[str, Any]:
    """Sections and keys; policies that are left out are those that they stand for."""
    values, parallel = recipe.model_dump(), recipe.parallel
    values["parallel"] |= {"gather": parallel.gather_policy, "reduce": parallel.reduce_policy}
    return values


def _word(value: Any) -> str:
    return "left out" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
