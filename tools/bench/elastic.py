"""`python -m megacode.tools.bench.elastic`: from any layout to any other, what changes of checkpoint and run."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacode.recipe import Recipe
from megacode.tools.bench.contest import SEED, contest_recipe, layout_words, step_batches
from megacode.tools.bench.ours import mesh_of, micro_batch, start_engine
from megacode.tools.bench.processes import Team, command_line
from megacode.tools.output import JsonFile, json_output

if TYPE_CHECKING:
    from megacode.checkpoint.reader import CheckpointReader
    from megacode.engine.zero import ZeroEngine
    from megacode.parallel.mesh import Mesh

ANSWER_SECONDS = 180.0
GLOBAL_SAMPLES = 16
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {"zero": 1}),
    (4, {"tensor": 4, "sequence": True, "zero": 1}),
    (4, {"pipeline": 2, "virtual_stages": 2, "zero": 2}),
    (4, {"tensor": 2, "context": 2, "zero": 3}),
    (8, {"tensor": 2, "pipeline": 2, "zero": 3}),
    (8, {"pipeline": 4, "zero": 1}),
    (8, {"zero": 3}),
]
"""Processes and the recipe's section `parallel`."""
MODEL = {"preset": "nano", "heads": 8, "kv_heads": 4, "vocabulary": 509}
"""A vocabulary that no number of tensor ranks divides."""


@dataclass(frozen=True)
class Row:
    """From one layout to another."""

    source: str
    target: str
    differing_tensors: int
    """Of weights and moments, between what was loaded and what the new layout saves before a step."""
    loss_difference: float
    """The largest, relative, of the steps after, to those of a run that did not stop nor change its layout."""


def case(folder: Path, world_size: int, parallel: dict[str, Any]) -> Recipe:
    """The training in a layout; `folder` gets a file that stands for the tokenizer."""
    (folder / "tokenizer.model").write_bytes(b"none")
    data = world_size
    for key in ("tensor", "pipeline", "context"):
        data //= parallel.get(key, 1)
    values = contest_recipe("nano", GLOBAL_SAMPLES // data, parallel, data).model_dump()
    return Recipe.model_validate(
        {**values, "model": MODEL, "tokenizer": {"path": str(folder / "tokenizer.model")}, "run": str(folder)}
    )


def serve(recipe: Recipe) -> Callable[[str, int], list[float]]:
    """What a rank answers. "straight": losses of so many steps from the seed's weights. "save FOLDER": the same, and a
    checkpoint. "load FOLDER TARGET": a checkpoint of what was loaded, at once, and the losses of so many steps after.
    """
    from pathlib import Path

    from megacode.checkpoint import store
    from megacode.checkpoint.reader import CheckpointReader, Progress
    from megacode.model.layers import part_of
    from megacode.train.start import resume, writer

    mesh = mesh_of(recipe)

    def save(zero: ZeroEngine, folder: str, step: int) -> None:
        progress = Progress(
            step, step * GLOBAL_SAMPLES, zero.optimizer_step, SEED, recipe.batch.sequence_length, num_tokens=0
        )
        parts = {name: part_of(parameter) for name, parameter in zero.parameters.items()}
        store.save(Path(folder), recipe, progress, parts, zero, writer(mesh))

    def answer(request: str, steps: int) -> list[float]:
        word, *folders = request.split()
        zero = start_engine(recipe, mesh)
        first = 0
        if word == "load":
            first = resume(zero, CheckpointReader(Path(folders[0])), mesh).step
            save(zero, folders[1], first)
        losses = [_step(recipe, zero, mesh, number) for number in range(first, first + steps)]
        if word == "save":
            save(zero, folders[0], steps)
        zero.engine.destroy()
        return losses

    return answer


def _step(recipe: Recipe, zero: ZeroEngine, mesh: Mesh, number: int) -> float:
    """The loss of a step. Collective."""
    import torch.distributed as dist

    from megacode.parallel.context import own_part

    num_labels = GLOBAL_SAMPLES * recipe.batch.sequence_length
    whole = [micro_batch(*batch) for batch in step_batches(recipe, number, mesh.data_rank, mesh.data)]
    batches = [own_part(batch, mesh.context, mesh.context_rank) for batch in whole]
    total = zero.train_step(batches, mesh.zero_size / num_labels)
    zero.update(recipe.optimizer.learning_rate)
    dist.all_reduce(total)
    return float(total.sum()) / mesh.tensor / num_labels


def differing(one: CheckpointReader, other: CheckpointReader) -> int:
    """How many weights and moments are not the same, bit for bit."""
    import torch

    from megacode.checkpoint.reader import STATES

    assert one.names == other.names
    assert one.progress == other.progress
    keys = itertools.product(one.names, ("weight", *STATES))
    return sum(not torch.equal(one.read(name, key), other.read(name, key)) for name, key in keys)


def measure(steps: int, layouts: list[tuple[int, dict[str, Any]]]) -> list[Row]:
    """Every layout to every layout: half the steps before, half after."""
    from megacode.checkpoint.reader import CheckpointReader

    names = [f"{world} x {layout_words(parallel)}" for world, parallel in layouts]
    rows = []
    with tempfile.TemporaryDirectory(prefix="megacode-elastic-") as name:
        folder, half = Path(name), steps // 2
        cases = [case(folder, *layout) for layout in layouts]
        saved = [folder / f"step_{number:08d}" for number in range(len(layouts))]
        straight: list[float] = []
        for recipe, (world, _), target in zip(cases, layouts, saved, strict=True):
            team = Team(serve, (recipe,), world, 1, ANSWER_SECONDS)
            straight = straight or team.ask("straight", steps)[0]
            team.ask(f"save {target}", half)
            team.stop()
        for number, (recipe, (world, _)) in enumerate(zip(cases, layouts, strict=True)):
            team = Team(serve, (recipe,), world, 1, ANSWER_SECONDS)
            for before, source in enumerate(saved):
                again = folder / f"step_{number + 1:04d}{before:04d}"
                losses = team.ask(f"load {source} {again}", steps - half)[0]
                error = max(abs(a / b - 1) for a, b in zip(losses, straight[half:], strict=True))
                changed = differing(CheckpointReader(source), CheckpointReader(again))
                rows.append(Row(names[before], names[number], changed, error))
            team.stop()
    return rows


def table(rows: list[Row]) -> str:
    """From (rows) x to (columns): the largest difference of losses."""
    sources, targets = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("source", "target"))
    cells = {(row.source, row.target): f"{row.loss_difference:.0e}" for row in rows}
    lines = [["from / to", *targets], ["---"] * (len(targets) + 1)]
    lines += [[source, *(cells[source, target] for target in targets)] for source in sources]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(
    steps: Annotated[int, typer.Option(min=2, help="Of which half come before the change of layouts.")] = 8,
    json_file: JsonFile = None,
) -> None:
    """Save in each layout and go on in each, on CPU processes; print how far losses are from those of one straight run.

    Ends with an error where a new layout changes a bit of a weight or a moment before its first step.

    Example: python -m megacode.tools.bench.elastic
    """
    with json_output(json_file) as write_json:
        rows = measure(steps, LAYOUTS)
        write_json([asdict(row) for row in rows])
        print(table(rows))
    if changed := [row for row in rows if row.differing_tensors]:
        raise RuntimeError(f"tensors differ from what was loaded: {changed}")
    print(f"{len(rows)} changes: every weight and moment bit for bit what was saved")


if __name__ == "__main__":
    command_line(main)
