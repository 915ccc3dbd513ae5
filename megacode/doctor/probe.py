"""The same training twice: in one plain process and in a layout, from the same weights on the same samples.

Any recipe will do. The learning rate is the recipe's peak in every step.
Many layouts run in one set of processes: meshes are kept by their sizes, and the reference on random tokens by what
the recipe says beside its layout.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megacode.checkpoint.reader import CheckpointReader
from megacode.data.stream import step_indices
from megacode.doctor.outcome import GRADIENT, WEIGHT, Outcome
from megacode.doctor.samples import RandomSamples, Samples
from megacode.engine.optimizer import param_groups, torch_adamw
from megacode.engine.zero import DTYPES, ZeroEngine, start_deepspeed
from megacode.kernels.dispatch import TABLE, choose_all, task
from megacode.model.layers import IGNORE, PlainLayers, Slice, initial_values, part_of
from megacode.model.llama import Llama
from megacode.parallel.build import with_served_kernels
from megacode.parallel.context import own_part
from megacode.parallel.mesh import Mesh, build_mesh
from megacode.parallel.pipeline import MicroBatch
from megacode.plan.layout import Layout, fit
from megacode.recipe import KernelsSection, ParallelSection, Recipe
from megacode.train.launch import find_device, find_place


def train(recipe: Recipe, steps: int) -> Outcome:
    """A rank's part of the training in the recipe's layout, on random tokens. Collective over the world."""
    return in_layout(recipe, RandomSamples(recipe), steps)


def reference(recipe: Recipe, steps: int) -> Outcome:
    """The same training in one process; computed once for all recipes that differ in layout and precision alone."""
    return _reference(alike(recipe).model_dump_json(), steps)


@functools.lru_cache(maxsize=8)
def _reference(recipe: str, steps: int) -> Outcome:
    config = Recipe.model_validate_json(recipe)
    return one_process(config, RandomSamples(config), steps)


def alike(recipe: Recipe) -> Recipe:
    """The recipe without what must not matter: two that are alike so are the same training."""
    update = {"parallel": ParallelSection(), "precision": "fp32", "deepspeed_config": None, "kernels": KernelsSection()}
    return recipe.model_copy(update=update)


def start_weights(recipe: Recipe) -> Callable[[str, Slice], Tensor]:
    """(name, part) -> where a training starts: `checkpoint.start_from`, or the seed's initial values."""
    if recipe.checkpoint.start_from is not None:
        return CheckpointReader(Path(recipe.checkpoint.start_from)).read_part
    return lambda name, part: part.take(initial_values(name, part, recipe.seed))


def one_process(recipe: Recipe, samples: Samples, steps: int, device: torch.device | str = "cpu") -> Outcome:
    """The recipe's training in one process, in fp32: plain torch, whole parameters, no DeepSpeed."""
    device, clip, started = torch.device(device), recipe.optimizer.clip, time.monotonic()
    # Whatever `auto` would take on a GPU: the layouts take that, and what errs in both would not be seen.
    plain = choose_all(task(device, torch.float32), dict.fromkeys(TABLE, "torch"))
    with device:
        model = Llama(recipe.model, PlainLayers(device, torch.float32, choices=plain))
    start, parameters = start_weights(recipe), dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start(name, part_of(parameter)))
    optimizer = torch_adamw(param_groups(model.parameters(), recipe.optimizer), recipe.optimizer, device)
    outcome = Outcome(parts={name: part_of(parameter) for name, parameter in parameters.items()})
    for step in range(steps):
        batches, num_valid = _batches(recipe, samples, step, device)
        total = 0.0
        for batch in batches:
            losses = model(batch.tokens, batch.positions, batch.segments, batch.labels)
            loss = losses.sum() / num_valid
            loss.backward()
            total += loss.item()
        outcome.losses.append(total)
        if step == 0:
            outcome.gradients = {name: _host(p.grad) for name, p in parameters.items() if p.grad is not None}
        # fp64 as DeepSpeed: on a CPU torch's fp32 norm of a million elements is off by up to 2e-5.
        squares = sum(p.grad.double().square().sum() for p in parameters.values() if p.grad is not None)
        norm = torch.as_tensor(squares).sqrt()
        outcome.norms.append(float(norm))
        if clip > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), clip, norm)
        optimizer.step()
        optimizer.zero_grad()
    outcome.weights = {name: _host(parameter.detach()) for name, parameter in parameters.items()}
    ways = [outcome.weights[name] - start(name, part_of(parameter)) for name, parameter in parameters.items()]
    outcome.moved = sum(float(way.double().square().sum()) for way in ways) ** 0.5
    outcome.seconds = time.monotonic() - started
    return outcome


def in_layout(recipe: Recipe, samples: Samples, steps: int) -> Outcome:
    """A rank's part of the recipe's training in its layout and precision. Collective over the world.

    Of ranks that hold the same parameters the first data rank has tensors in its outcome.
    """
    started = time.monotonic()
    start_deepspeed()
    layout, device = fit(recipe, dist.get_world_size()), find_device(find_place())
    mesh = mesh_of(layout)
    # In fp32, or on the CPU, not every kernel serves that the recipe may ask for.
    recipe, _ = with_served_kernels(recipe, device, DTYPES[recipe.precision])
    engine = ZeroEngine(recipe, layout, mesh, device)
    start = start_weights(recipe)
    for name, parameter in engine.parameters.items():
        engine.write(name, start(name, part_of(parameter)))
    outcome = Outcome(parts={name: part_of(parameter) for name, parameter in engine.parameters.items()})
    for step in range(steps):
        batches, num_valid = _batches(recipe, samples, step, device, mesh)
        dist.all_reduce(num_valid, group=mesh.data_group)
        loss = engine.train_step(batches, mesh.zero_size / num_valid)
        if step == 0:
            outcome.gradients = _read(engine, mesh, GRADIENT)
        outcome.norms.append(float(engine.update(recipe.optimizer.learning_rate)[0]))
        dist.all_reduce(loss)  # every tensor rank of the last stage has the same, the other stages have zero
        outcome.losses.append(float(loss.sum() / num_valid) / mesh.tensor)
    outcome.weights = _read(engine, mesh, WEIGHT)
    engine.engine.destroy()
    outcome.seconds = time.monotonic() - started
    return outcome


def mesh_of(layout: Layout) -> Mesh:
    """The mesh of a layout, made once a process and kept: each gloo group polls in threads of its own. Collective."""
    return _mesh(layout.pipeline, layout.data, layout.tensor, layout.context)


@functools.cache
def _mesh(pipeline: int, data: int, tensor: int, context: int) -> Mesh:
    return build_mesh(pipeline, data, tensor, context)


def _batches(
    recipe: Recipe, samples: Samples, step: int, device: torch.device, mesh: Mesh | None = None
) -> tuple[list[MicroBatch], Tensor]:
    """A rank's micro-batches of a step (without a mesh: all of them), and how many of their labels count."""
    batch = recipe.batch
    data, rank = (mesh.data, mesh.data_rank) if mesh else (1, 0)
    context, context_rank = (mesh.context, mesh.context_rank) if mesh else (1, 0)
    numbers = step_indices(step * batch.global_samples, batch.global_samples, batch.micro_samples, data, rank)
    found = [own_part(samples.micro_batch(each), context, context_rank) for each in numbers]
    num_valid = sum((each.labels != IGNORE).sum() for each in found)
    return [each.to(device) for each in found], torch.as_tensor(num_valid, device=device)


def _read(engine: ZeroEngine, mesh: Mesh, key: str) -> dict[str, Tensor]:
    """This tensor rank's part of every parameter, on the first data rank. Collective over the data ranks."""
    found = {}
    for name in engine.parameters:
        value = engine.read(name, key)
        if mesh.zero_rank == 0:
            found[name] = _host(value)
    return found


def _host(value: Tensor) -> Tensor:
    return value.detach().float().cpu().clone()
