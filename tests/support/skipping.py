"""A training with a step whose update must be left out, in any layout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megacode.model.layers import IGNORE, initial_values, part_of
from megacode.parallel.mesh import Mesh, build_mesh
from megacode.plan.layout import Layout, fit
from megacode.recipe import Recipe
from support.training import SEED, _mesh, micro_batch, samples

if TYPE_CHECKING:
    from megacode.engine.zero import ZeroEngine
    from support.world import World


def start(config: Recipe) -> tuple[Layout, Mesh, ZeroEngine]:
    """A rank's engine with the initial weights of a seed. Collective."""
    from megacode.engine.zero import ZeroEngine, start_deepspeed

    start_deepspeed()
    plan = fit(config, dist.get_world_size())
    mesh = _mesh(build_mesh, plan.pipeline, plan.data, plan.tensor, 1)
    engine = ZeroEngine(config, plan, mesh, torch.device("cpu"))
    for name, parameter in engine.parameters.items():
        part = part_of(parameter)
        engine.write(name, part.take(initial_values(name, part, SEED)))
    return plan, mesh, engine


def train(
    config: Recipe, steps: list[tuple[int, str]]
) -> tuple[dict[str, torch.Tensor], int, list[tuple[float, float]]]:
    """One update per (number of the samples, what is wrong: "", "gradient" or "loss").

    Returns this rank's weights and moments, Adam's step count, and of each step (norm, skipped).
    """
    plan, mesh, engine = start(config)
    seen = []
    size, ranks = config.batch.micro_samples, mesh.zero_size
    for number, wrong in steps:
        tokens, labels = samples(config, number)
        rows = [slice((m * ranks + mesh.zero_rank) * size, (m * ranks + mesh.zero_rank + 1) * size)
                for m in range(plan.num_micro_batches)]  # fmt: skip
        scale: Any = ranks / (labels != IGNORE).sum()
        engine.train_step(
            [micro_batch(config, tokens[r], labels[r]) for r in rows],
            scale * (float("nan") if wrong == "gradient" else 1),
        )
        loss = torch.tensor(math.inf if wrong == "loss" else 4.0)
        norm, skipped = engine.update(config.optimizer.learning_rate, loss)
        seen.append((float(norm), float(skipped)))
    keys = ("weight", "exp_avg", "exp_avg_sq")
    state = {f"{name} {key}": engine.read(name, key).clone() for name in engine.parameters for key in keys}
    count = engine.optimizer_step
    engine.engine.destroy()
    return state, count, seen


def check_left_out(world: World, config: Recipe) -> None:
    """A step whose gradients are not finite, between two others, changes nothing."""
    good = world.run(train, config, [(0, ""), (2, "")])
    bad = world.run(train, config, [(0, ""), (1, "gradient"), (2, "")])
    for (want, _, _), (have, count, seen) in zip(good, bad, strict=True):
        assert count == 2
        assert [skipped for _, skipped in seen] == [0, 1, 0]
        for name, value in want.items():
            assert torch.equal(have[name], value), name
