"""`python -m megacode.tools.bench.memory`: live bytes of a step on CPU processes, beside the plan's formulas."""

from __future__ import annotations

import gc
import importlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacode.plan.layout import fit
from megacode.plan.memory import stage_memory
from megacode.recipe import Recipe
from megacode.tools.bench.contest import layout_words, step_batches
from megacode.tools.bench.ours import mesh_of, micro_batch, start_engine
from megacode.tools.bench.processes import Team, command_line
from megacode.tools.output import JsonFile, json_output

if TYPE_CHECKING:
    from megacode.parallel.mesh import Mesh

BUCKET_ELEMENTS = 100_000
NUM_MICRO_BATCHES = 4
TOLERANCE = 0.05
ANSWER_SECONDS = 180.0
POLICIES: list[dict[str, Any]] = [
    {"zero": 1},
    *({"zero": 2, "reduce": reduce} for reduce in ("step", "microbatch")),
    *(
        {"zero": 3, "gather": gather, "reduce": reduce}
        for gather in ("step", "microbatch")
        for reduce in ("step", "microbatch")
    ),
]
"""All that a recipe can say of ZeRO."""
LAYOUTS: list[tuple[int, str, dict[str, Any]]] = [
    (2, "bf16", {"tensor": 2}),
    (2, "bf16", {"tensor": 2, "sequence": True}),
    (2, "bf16", {"tensor": 2, "sequence": True, "recompute": "selective"}),
    (2, "bf16", {"tensor": 2, "sequence": True, "recompute": "full"}),
    (2, "fp32", {"recompute": "selective"}),
    (2, "bf16", {"recompute": "full"}),
    (2, "fp32", {"context": 2}),
    (2, "bf16", {"context": 2, "zero": 3}),
    (2, "bf16", {"pipeline": 2, "virtual_stages": 2}),
    (4, "fp32", {"tensor": 2, "sequence": True, "pipeline": 2, "recompute": "full"}),
    (4, "bf16", {"tensor": 2, "sequence": True, "context": 2, "recompute": "selective", "zero": 3}),
]
CASES = [(2, precision, policy) for precision in ("fp32", "bf16") for policy in POLICIES] + LAYOUTS
"""Processes, precision and the recipe's section `parallel`."""


@dataclass(frozen=True)
class Row:
    """A pipeline rank: live bytes of its fullest process at the worst moment of a step, and what the plan says."""

    processes: int
    precision: str
    parallel: dict[str, Any]
    stage: int
    moment: str
    """The worst, by the plan."""
    live_bytes: int
    planned_bytes: int

    @property
    def error(self) -> float:
        """Of the plan, relative."""
        return self.planned_bytes / self.live_bytes - 1


def case_recipe(
    folder: Path, world_size: int, precision: str, parallel: dict[str, Any], num_micro_batches: int = NUM_MICRO_BATCHES
) -> Recipe:
    """A model of 1.2 million parameters, 256 tokens a micro-batch; five layers, so that stages are uneven.

    Args:
        folder: gets a DeepSpeed file with small buckets.
        world_size: number of processes.
        precision: of the recipe.
        parallel: of the recipe.
        num_micro_batches: a step, on each data rank.
    """
    config = folder / "deepspeed.json"
    zero = {"reduce_bucket_size": BUCKET_ELEMENTS, "stage3_prefetch_bucket_size": BUCKET_ELEMENTS}
    config.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    data = world_size
    for key in ("tensor", "pipeline", "context"):
        data //= parallel.get(key, 1)
    sizes = {"hidden": 128, "heads": 4, "kv_heads": 2, "ffn": 352, "layers": 5, "vocabulary": 1024}
    return Recipe.model_validate(
        {
            "run": "unused",
            "precision": precision,
            "deepspeed_config": str(config),
            "model": {"preset": "nano", **sizes},
            "tokenizer": {"path": "unused"},
            "data": {"train": "unused"},
            "parallel": parallel,
            "batch": {"global_samples": num_micro_batches * data, "micro_samples": 1, "sequence_length": 256},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"steps": 10**6},
        }
    )


def live_bytes(recipe: Recipe, mesh: Mesh) -> int:
    """Most bytes of tensors that live at once in a step of this rank. Collective over all ranks."""
    from megacode.engine.zero import DTYPES, start_deepspeed
    from megacode.parallel.context import own_part
    from megacode.parallel.live import LiveBytes, uncounted_on_cpu

    importlib.import_module("torch._dynamo")  # zero.Init imports it while torch.Tensor is patched, which it refuses
    start_deepspeed()
    whole = [micro_batch(*batch) for batch in step_batches(recipe, 0, mesh.data_rank, mesh.data)]
    batches = [own_part(batch, mesh.context, mesh.context_rank) for batch in whole]
    with uncounted_on_cpu(DTYPES[recipe.precision]), LiveBytes() as live:
        zero = start_engine(recipe, mesh)
        for _ in range(3 if recipe.parallel.zero == 3 else 2):  # ZeRO-3's trace is complete from the third step on
            gc.collect()
            live.peak = live.count()
            zero.train_step(batches, 1e-3)
            zero.update(1e-3)
    zero.engine.destroy()
    return live.peak


def compare(recipe: Recipe, ranks: list[int]) -> list[Row]:
    """A row a pipeline rank, from the live bytes of all ranks of a world."""
    layout = fit(recipe, len(ranks))
    per_stage = len(ranks) // layout.pipeline
    parallel = {**recipe.parallel.model_dump(exclude_defaults=True), "zero": recipe.parallel.zero}
    return [
        Row(
            len(ranks), recipe.precision, parallel, stage.pipeline_rank, stage.moment,
            max(ranks[stage.pipeline_rank * per_stage :][:per_stage]), stage.total_bytes,
        )
        for stage in stage_memory(recipe, layout)
    ]  # fmt: skip


def serve(recipe: Recipe) -> Callable[[str, int], int]:
    """What a rank answers: its live bytes."""
    mesh = mesh_of(recipe)
    return lambda request, count: live_bytes(recipe, mesh)


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = ["processes", "precision", "layout", "stage", "worst moment", "live MB", "plan MB", "error"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        cells = [
            str(row.processes), row.precision, layout_words(row.parallel), str(row.stage), row.moment,
            f"{row.live_bytes / 1e6:.2f}", f"{row.planned_bytes / 1e6:.2f}", f"{row.error:+.1%}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(json_file: JsonFile = None) -> None:
    """Measure the live bytes of a step in every ZeRO stage and policy and in several layouts, beside the plan's.

    Ends with an error where the plan is more than 5 % off.
    """
    rows: list[Row] = []
    with json_output(json_file) as write_json:
        with tempfile.TemporaryDirectory() as folder:
            for case in CASES:
                recipe = case_recipe(Path(folder), *case)
                team = Team(serve, (recipe,), case[0], 1, ANSWER_SECONDS)
                rows += compare(recipe, team.ask("live bytes", 0))
                team.stop()
        write_json([{**asdict(row), "error": row.error} for row in rows])
        print(table(rows))
    if any(abs(row.error) > TOLERANCE for row in rows):
        raise RuntimeError(f"the plan is more than {TOLERANCE:.0%} off")


if __name__ == "__main__":
    command_line(main)
