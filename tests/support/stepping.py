"""AdamW in float64, and an engine's updates to compare with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from megacode.recipe import OptimizerSection, Recipe
from support.skipping import start
from support.training import micro_batch, samples

Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Weight, mean of gradients, mean of squared gradients; float64."""


def adamw(
    state: Moments, gradient: torch.Tensor, step: int, section: OptimizerSection, rate: float, decay: float
) -> Moments:
    """A step of AdamW (Loshchilov and Hutter 2019, algorithm 2), counted from 1."""
    weight, mean, square = state
    b1, b2, gradient = section.beta1, section.beta2, gradient.double()
    mean, square = b1 * mean + (1 - b1) * gradient, b2 * square + (1 - b2) * gradient**2
    direction = mean / (1 - b1**step) / ((square / (1 - b2**step)).sqrt() + section.epsilon)
    return weight - rate * decay * weight - rate * direction, mean, square


def is_compiled() -> bool:
    """Whether DeepSpeed's CPU Adam has been compiled on this machine, which takes a minute."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    return root.is_dir() and next(root.rglob("cpu_adam.so"), None) is not None


COMPILED = pytest.mark.skipif(not is_compiled(), reason="DeepSpeed's CPU Adam is not compiled here (it takes a minute)")


def updates(config: Recipe, rates: list[float]) -> list[dict[str, Any]]:
    """A rank's engine after its start and after each update at the rates: of each parameter weight, moments, and the
    clipped gradient that the update was made of; with Adam's count under "count".
    """
    _, mesh, engine = start(config)

    def state() -> dict[str, Any]:
        keys = ("weight", "exp_avg", "exp_avg_sq")
        return {name: [engine.read(name, key).double() for key in keys] for name in engine.parameters}

    seen: list[dict[str, Any]] = [{"state": state(), "backends": engine.backends}]
    for number, rate in enumerate(rates):
        tokens, labels = samples(config, number)
        rows = range(mesh.zero_rank, len(tokens), mesh.zero_size)
        engine.train_step([micro_batch(config, tokens[r : r + 1], labels[r : r + 1]) for r in rows], 1e-2)
        gradients = {name: engine.read(name, "gradient").double() for name in engine.parameters}
        norm, _ = engine.update(rate)
        scale = min(1.0, config.optimizer.clip / (float(norm) + 1e-6))
        seen.append({
            "state": state(),
            "gradients": {name: gradient * scale for name, gradient in gradients.items()},
            "count": engine.optimizer_step,
        })  # fmt: skip
    engine.engine.destroy()
    return seen


def device_waits(config: Recipe, steps: int, as_deepspeed: bool) -> list[int]:
    """How often each step has DeepSpeed wait for the whole device, with its own timers or with ours."""
    from unittest import mock

    from deepspeed.accelerator import get_accelerator

    from megacode.engine.config import deepspeed_config

    def with_its_timers(recipe: Recipe) -> dict[str, Any]:
        return {**deepspeed_config(recipe), "timers": {}}

    made = with_its_timers if as_deepspeed else deepspeed_config
    with mock.patch("megacode.engine.zero.deepspeed_config", made):
        _, mesh, engine = start(config)
    counts = []
    for number in range(steps):
        tokens, labels = samples(config, number)
        rows = range(mesh.zero_rank, len(tokens), mesh.zero_size)
        batches = [micro_batch(config, tokens[r : r + 1], labels[r : r + 1]) for r in rows]
        with mock.patch.object(type(get_accelerator()), "synchronize") as waits:
            engine.train_step(batches, 1e-2)
            engine.update(1e-3)
        counts.append(waits.call_count)
    engine.engine.destroy()
    return counts
