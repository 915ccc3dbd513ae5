"""megacode as a contestant: its engine as the trainer uses it, without reading data and writing files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megacode.recipe import Recipe
from megacode.tools.bench.contest import Step, initial_weights

if TYPE_CHECKING:
    from torch import Tensor

    from megacode.parallel.pipeline import MicroBatch


def micro_batch(tokens: Tensor, labels: Tensor) -> MicroBatch:
    """[batch, sequence] tokens and labels as what the pipeline takes, without document masks."""
    import torch

    from megacode.parallel.pipeline import MicroBatch

    batch, sequence = tokens.shape
    return MicroBatch.whole(tokens, labels, torch.arange(sequence).expand(batch, sequence))


def engine(recipe: Recipe) -> Step:
    """ZeroEngine in the layout of the recipe, all ranks being data ranks."""
    import torch
    import torch.distributed as dist

    from megacode.engine.zero import ZeroEngine, start_deepspeed
    from megacode.parallel.mesh import build_mesh
    from megacode.plan.layout import fit

    start_deepspeed()
    layout = fit(recipe, dist.get_world_size())
    mesh = build_mesh(layout.pipeline, layout.data, layout.tensor, layout.context)
    zero = ZeroEngine(recipe, layout, mesh, torch.device("cpu"))
    for name, value, _ in initial_weights(recipe):
        zero.write(name, value)
    num_labels = recipe.batch.global_samples * recipe.batch.sequence_length

    def step(batches: list[tuple[Tensor, Tensor]]) -> float:
        total = zero.train_step([micro_batch(*batch) for batch in batches], mesh.zero_size / num_labels)
        zero.update(recipe.optimizer.learning_rate)
        return float(total.sum()) * mesh.zero_size / num_labels

    return step
