"""`python -m megacode.tools.bench.communication`: what a step sends, counted on CPU processes, beside the formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacode import recipe as recipes
from megacode.errors import UserError
from megacode.plan.communication import Exchange, exchanges
from megacode.plan.layout import fit
from megacode.plan.memory import recipe_job
from megacode.recipe import Recipe
from megacode.tools.bench.contest import contest_recipe, layout_words, step_batches
from megacode.tools.bench.ours import mesh_of, micro_batch, start_engine
from megacode.tools.bench.processes import Team, command_line
from megacode.tools.output import JsonFile, json_output

if TYPE_CHECKING:
    from megacode.parallel.mesh import Mesh
    from megacode.parallel.traffic import Call

STEPS = 3
"""The last of so many steps is counted: ZeRO-3 knows the order of a step's modules from the third on."""
SMALL_ELEMENTS = 64
"""All-reduces over data, model or world with no more elements are norms, losses and label counts."""
ANSWER_SECONDS = 180.0
NUM_MICRO_BATCHES = 4
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"tensor": 2}),
    (4, {"pipeline": 4}),
    (2, {"pipeline": 2, "virtual_stages": 2}),
    (2, {"zero": 1}),
    (2, {"zero": 2}),
    (2, {"zero": 3}),
    (2, {"zero": 3, "reduce": "step"}),
    (2, {"zero": 3, "gather": "microbatch"}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"tensor": 2, "recompute": "full"}),
    (2, {"tensor": 2, "sequence": True, "recompute": "full"}),
    (2, {"context": 2}),
    (2, {"context": 2, "recompute": "full"}),
    (4, {"tensor": 2, "sequence": True, "zero": 2}),
    (8, {"tensor": 2, "pipeline": 2, "zero": 3}),
    (8, {"tensor": 2, "sequence": True, "context": 2, "pipeline": 2, "zero": 3}),
]
"""Processes and the recipe's section `parallel`."""


@dataclass(frozen=True)
class Row:
    """Calls of one axis and kind in a step of one rank."""

    axis: str
    kind: str
    calls: int
    planned_calls: tuple[int, int]
    """Fewest and most."""
    bytes: int
    planned_bytes: tuple[float, float]
    """Least and most."""

    @property
    def right(self) -> bool:
        """Whether what was counted is what the formulas say."""
        (fewest, most), (least, largest) = self.planned_calls, self.planned_bytes
        return fewest <= self.calls <= most and least <= self.bytes <= largest


def count_step(recipe: Recipe, mesh: Mesh) -> list[Call]:
    """What this rank exchanges in a step: forwards, backwards, update. Collective over all ranks."""
    from megacode.parallel.context import own_part
    from megacode.parallel.traffic import Traffic

    zero = start_engine(recipe, mesh)
    for number in range(STEPS):
        whole = [micro_batch(*batch) for batch in step_batches(recipe, number, mesh.data_rank, mesh.data)]
        batches = [own_part(batch, mesh.context, mesh.context_rank) for batch in whole]
        with Traffic(mesh) as traffic:
            zero.train_step(batches, 1e-4)
            zero.update(recipe.optimizer.learning_rate)
    zero.engine.destroy()
    return traffic.calls


def is_small(call: Call) -> bool:
    """Whether it is one of the few all-reduces whose size depends neither on the model nor on the batch."""
    axes = ("data", "model", "world")
    return call.axis in axes and call.kind == "all-reduce" and call.elements <= SMALL_ELEMENTS


def compare(calls: Iterable[Call], planned: list[Exchange]) -> list[Row]:
    """Counted beside planned, a row an axis and kind; small all-reduces are left out."""
    calls = [call for call in calls if not is_small(call)]
    keys = dict.fromkeys([*((one.axis, one.kind) for one in planned), *((call.axis, call.kind) for call in calls)])
    rows = []
    for axis, kind in keys:
        own = [one for one in planned if (one.axis, one.kind) == (axis, kind)]
        met = [call for call in calls if (call.axis, call.kind) == (axis, kind)]
        fewest, most = sum(one.calls for one in own), sum(one.most_calls or one.calls for one in own)
        least = sum(one.bytes if one.least_bytes is None else one.least_bytes for one in own)
        size = sum(call.bytes for call in met)
        rows.append(Row(axis, kind, len(met), (fewest, most), size, (least, sum(one.bytes for one in own))))
    return rows


def compare_ranks(recipe: Recipe, ranks: list[list[Call]]) -> list[list[Row]]:
    """`compare` for each rank of a world that ran the recipe."""
    layout = fit(recipe, len(ranks))
    job = recipe_job(recipe, layout)
    per_stage = len(ranks) // layout.pipeline
    return [compare(calls, exchanges(job, rank // per_stage)) for rank, calls in enumerate(ranks)]


def serve(recipe: Recipe) -> Callable[[str, int], list[Call]]:
    """What a rank answers: its calls."""
    mesh = mesh_of(recipe)
    return lambda request, count: count_step(recipe, mesh)


def main(
    recipe: Annotated[Path | None, typer.Argument(help="Left out: a nano model in several layouts.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value over the recipe.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Ranks for the recipe.")] = 8,
    json_file: JsonFile = None,
) -> None:
    """Count the collectives, transfers and bytes of a step's ranks and print them beside what the formulas say.

    Ends with an error where they differ. Weights and tokens are random; the recipe's model must fit the CPU.

    Example: python -m megacode.tools.bench.communication my.yaml model.preset=nano --processes 4
    """
    cases = [(world, contest_recipe("nano", NUM_MICRO_BATCHES, section, _data_ranks(world, section)))
             for world, section in LAYOUTS]  # fmt: skip
    if recipe is not None:
        chosen = recipes.load(recipe, overrides)
        if chosen.model.vocabulary is None:
            raise UserError(f"{recipe}: set model.vocabulary: no tokenizer is read here")
        cases = [(processes, chosen)]
    with json_output(json_file) as write_json:
        found = []
        for world, one in cases:
            fit(one, world)
            team = Team(serve, (one,), world, 1, ANSWER_SECONDS)
            ranks = team.ask("calls", 0)
            team.stop()
            found.append((world, one, ranks, compare_ranks(one, ranks)))
        write_json([_as_dict(*case) for case in found])
        print(table(found))
    if not all(row.right for *_, ranks in found for rows in ranks for row in rows):
        raise RuntimeError("what was counted is not what the formulas say")


def _data_ranks(world: int, section: dict[str, Any]) -> int:
    return world // (section.get("tensor", 1) * section.get("pipeline", 1) * section.get("context", 1))


Case = tuple[int, Recipe, "list[list[Call]]", list[list[Row]]]


def table(found: list[Case]) -> str:
    """Markdown: of each layout, a line an axis and kind, of the first rank of the first pipeline stage."""
    head = ["processes", "layout", "axis", "kind", "calls", "formula", "KiB", "formula", "small all-reduces"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for world, recipe, calls, rows in found:
        small = sum(is_small(call) for call in calls[0])
        for row in rows[0]:
            cells = [
                str(world), _describe(recipe), row.axis, row.kind, str(row.calls), _span(row.planned_calls, 1),
                f"{row.bytes / 1024:,.1f}", _span(row.planned_bytes, 1024), str(small),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _describe(recipe: Recipe) -> str:
    return layout_words({**recipe.parallel.model_dump(exclude_defaults=True), "zero": recipe.parallel.zero})


def _span(bounds: tuple[float, float], unit: int) -> str:
    texts = [f"{bound / unit:,.1f}" if unit > 1 else str(bound) for bound in bounds]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _as_dict(world: int, recipe: Recipe, calls: list[list[Call]], ranks: list[list[Row]]) -> dict[str, Any]:
    return {
        "processes": world,
        "parallel": recipe.parallel.model_dump(exclude_defaults=True),
        "ranks": [[{**dataclasses.asdict(row), "right": row.right} for row in rows] for rows in ranks],
        "small": [sum(is_small(call) for call in own) for own in calls],
    }


if __name__ == "__main__":
    command_line(main)
