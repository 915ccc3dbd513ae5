"""A training with a step whose update must be left out, in any layout."""

import math
from typing import Any

import torch
import torch.distributed as dist

from megacode.model.layers import IGNORE, initial_values, part_of
from megacode.parallel.mesh import build_mesh
from megacode.plan.layout import fit
from megacode.recipe import Recipe
from support.training import SEED, _mesh, micro_batch, samples


def train(
    config: Recipe, steps: list[tuple[int, str]]
) -> tuple[dict[str, torch.Tensor], int, list[tuple[float, float]]]:
    """One update per (number of the samples, what is wrong: "", "gradient" or "loss").

    Returns this rank's weights and moments, Adam's step count, and of each step (norm, skipped).
    """
    from megacode.engine.zero import ZeroEngine, start_deepspeed

    start_deepspeed()
    plan = fit(config, dist.get_world_size())
    mesh = _mesh(build_mesh, plan.pipeline, plan.data, plan.tensor, 1)
    engine = ZeroEngine(config, plan, mesh, torch.device("cpu"))
    for name, parameter in engine.parameters.items():
        part = part_of(parameter)
        engine.write(name, part.take(initial_values(name, part, SEED)))
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
