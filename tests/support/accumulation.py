"""The gradient of a step in one process, accumulated by hand; and how far a layout's reduced gradient is from it."""

from __future__ import annotations

import torch

from megacode.engine.zero import DTYPES
from megacode.model.layers import IGNORE, PlainLayers, Slice
from megacode.model.llama import Llama, initialise
from megacode.recipe import Recipe
from support.training import SEED, Outcome, micro_batch, samples

Gradients = dict[str, torch.Tensor]


def accumulated(config: Recipe, arithmetic: str, sums: str) -> Gradients:
    """The step's gradient: plain torch, a micro-batch a sample, each one's gradients added to `sums` of that precision.

    `arithmetic` is that of forward and backward. The weights are rounded to bf16 whatever the arithmetic, as the
    training copies of a bf16 run are: what differs is arithmetic and accumulation alone.
    """
    model = initialise(Llama(config.model, PlainLayers("cpu", DTYPES[arithmetic])), SEED)
    model.to(torch.bfloat16).to(DTYPES[arithmetic])
    tokens, labels = samples(config, 0)
    scale = 1 / (labels != IGNORE).sum()
    totals = {name: torch.zeros_like(p, dtype=DTYPES[sums]) for name, p in model.named_parameters()}
    for i in range(len(tokens)):
        batch = micro_batch(config, tokens[i : i + 1], labels[i : i + 1])
        (model(batch.tokens, batch.positions, batch.segments, batch.labels).sum() * scale).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            totals[name] += parameter.grad
            parameter.grad = None
    return {name: total.float() for name, total in totals.items()}


def error(have: Gradients, want: Gradients) -> float:
    """Relative error of the gradient as one vector."""
    squares = sum(float((have[name] - want[name]).square().sum()) for name in want)
    return (squares / sum(float(value.square().sum()) for value in want.values())) ** 0.5


def whole(ranks: list[tuple[Outcome, dict[str, Slice]]]) -> Gradients:
    """The reduced gradients of data ranks that hold the whole model between them."""
    return {name: gradient for outcome, _ in ranks for name, gradient in outcome.gradients.items()}
