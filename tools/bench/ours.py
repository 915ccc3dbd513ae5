"""megacode as a contestant: its engine as the trainer uses it, and the trainer itself."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacode.recipe import Recipe
from megacode.tools.bench.contest import Step, initial_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from megacode.engine.zero import ZeroEngine
    from megacode.parallel.mesh import Mesh
    from megacode.parallel.pipeline import MicroBatch


def micro_batch(tokens: Tensor, labels: Tensor) -> MicroBatch:
    """[batch, sequence] tokens and labels as what the pipeline takes, without document masks."""
    import torch

    from megacode.parallel.pipeline import MicroBatch

    batch, sequence = tokens.shape
    return MicroBatch.whole(tokens, labels, torch.arange(sequence).expand(batch, sequence))


def mesh_of(recipe: Recipe) -> Mesh:
    """The mesh of the recipe's layout over all processes. Collective."""
    import torch.distributed as dist

    from megacode.plan.layout import fit

    layout = fit(recipe, dist.get_world_size())
    return _mesh(layout.pipeline, layout.data, layout.tensor, layout.context)


@functools.cache
def _mesh(pipeline: int, data: int, tensor: int, context: int) -> Mesh:
    """One for all recipes that it serves: gloo's threads poll, and take part of a core where many groups are idle."""
    from megacode.parallel.mesh import build_mesh

    return build_mesh(pipeline, data, tensor, context)


def start_engine(recipe: Recipe, mesh: Mesh, device: str = "cpu", num_groups: int = 1) -> ZeroEngine:
    """The recipe's engine with its initial weights. Collective."""
    import torch
    import torch.distributed as dist

    from megacode.engine.zero import ZeroEngine, start_deepspeed
    from megacode.model.layers import part_of
    from megacode.plan.layout import fit

    start_deepspeed()
    zero = ZeroEngine(recipe, fit(recipe, dist.get_world_size()), mesh, torch.device(device), num_groups)
    for name, value, _ in initial_weights(recipe, device):
        if name in zero.parameters:
            zero.write(name, part_of(zero.parameters[name]).take(value))
    return zero


def trainer(recipe: Recipe, device: str) -> Callable[[], float]:
    """The loop of every run with all that a step of it does: data from shards, forwards and backwards, update, a line
    of metrics. Only checkpoints are left out. Collective, as a call of what it returns is: a step; its loss."""
    import rich.console
    import torch
    import torch.distributed as dist

    from megacode.data.tokenizer import Tokenizer
    from megacode.plan.layout import fit
    from megacode.train.console import Console
    from megacode.train.faults import Requests
    from megacode.train.journal import Journal
    from megacode.train.loop import Trainer
    from megacode.train.start import new_progress, open_streams

    class KeepingJournal(Journal):
        def metrics(self, values: dict[str, Any]) -> None:
            self.last = values
            super().metrics(values)

    mesh = mesh_of(recipe)
    stream, _ = open_streams(recipe, Tokenizer(recipe.tokenizer.path))
    zero = start_engine(recipe, mesh, device, num_groups=2 * len(stream.sources))
    run = Path(recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    console = rich.console.Console(file=io.StringIO())
    journal = KeepingJournal(run, 0, Console(0, recipe.schedule.steps, console))
    loop = Trainer(
        recipe, fit(recipe, dist.get_world_size()), mesh, torch.device(device), zero, stream, None,
        new_progress(recipe, stream), Requests(run, looks=True), journal,
    )  # fmt: skip

    def step() -> float:
        loop.step()
        return float(journal.last["loss"])

    return step


def engine(recipe: Recipe) -> Step:
    """ZeroEngine in the layout of the recipe, all ranks being data ranks."""
    mesh = mesh_of(recipe)
    zero = start_engine(recipe, mesh)
    num_labels = recipe.batch.global_samples * recipe.batch.sequence_length

    def step(batches: list[tuple[Tensor, Tensor]]) -> float:
        total = zero.train_step([micro_batch(*batch) for batch in batches], mesh.zero_size / num_labels)
        zero.update(recipe.optimizer.learning_rate)
        return float(total.sum()) * mesh.zero_size / num_labels

    return step
