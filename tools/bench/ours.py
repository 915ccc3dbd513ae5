"""megacode as a contestant: its engine as the trainer uses it, without reading data and writing files."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from megacode.recipe import Recipe
from megacode.tools.bench.contest import Step

if TYPE_CHECKING:
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


def start_engine(recipe: Recipe, mesh: Mesh) -> ZeroEngine:
    """The recipe's engine with its initial weights. Collective."""
    import torch
    import torch.distributed as dist

    from megacode.engine.zero import ZeroEngine, start_deepspeed
    from megacode.model.layers import initial_values, part_of
    from megacode.plan.layout import fit

    start_deepspeed()
    zero = ZeroEngine(recipe, fit(recipe, dist.get_world_size()), mesh, torch.device("cpu"))
    for name, parameter in zero.parameters.items():
        part = part_of(parameter)
        zero.write(name, part.take(initial_values(name, part, recipe.seed)))
    return zero


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
