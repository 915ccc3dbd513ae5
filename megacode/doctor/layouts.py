"""A tiny model trained in parallel layouts against one process: losses, norms, clipping, weights, fp32 masters."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megacode.doctor.finding import Finding, verdict
from megacode.doctor.outcome import Outcome, compare
from megacode.doctor.probe import reference, train
from megacode.model.layers import Slice, initial_values
from megacode.plan.layout import Layout, fit
from megacode.recipe import Recipe

Run = Callable[..., list[Any]]
"""run(function, *args): calls it on every rank of a world; results in rank order."""

STEPS = 2
TOLERANCE = 1e-5
"""fp32: layouts differ by the order of sums alone, some 1e-7 relative in losses, norms and gradients. Adam divides them
by no less than epsilon, which keeps the weights as near."""
BF16_LOSS_TOLERANCE = 4e-3
"""bf16 keeps 8 bits: one rounding of the logits is 4e-3, and a mean over the tokens averages it out."""
CLIPPED = {"learning_rate": 1e-2, "clip": 1e-2, "epsilon": 1e-4}
"""A clip far below the norm. Adam divides out whatever scales all gradients, unless its epsilon is as large as they
are: here the update depends on how much was clipped."""
SMALL_STEPS = {"learning_rate": 1e-6, "clip": 0.0}
"""Below half a unit in the last place of nearly all initial weights in bf16, far above that in fp32."""
MEND = "do not train in this layout: install what constraints.txt names, and if that is so, report it"


def layouts(num_processes: int) -> list[tuple[int, int]]:
    """(tensor, pipeline) of few layouts that together share the work over every axis which the processes allow."""
    chosen, missing = [], {"tensor", "pipeline", "data"}
    for tensor, pipeline in ((2, 2), (1, 2), (2, 1), (1, 1)):
        if num_processes % (tensor * pipeline):
            continue
        sizes = {"tensor": tensor, "pipeline": pipeline, "data": num_processes // (tensor * pipeline)}
        shared = {axis for axis, size in sizes.items() if size > 1}
        if shared & missing:
            chosen.append((tensor, pipeline))
            missing -= shared
    return chosen


def recipe(num_processes: int, tensor: int, pipeline: int, num_micro_batches: int = 2, **sections: Any) -> Recipe:
    """The doctor's model, with grouped queries, a vocabulary that needs padding, and document masks.

    With 2 micro-batches a pipeline of 2 has nothing but its warm-up and its cool-down, with 4 it has a middle too.
    """
    values: dict[str, Any] = {
        "run": "unused",
        "precision": "fp32",
        "model": {"preset": "nano", "hidden": 32, "ffn": 48, "vocabulary": 61},
        "tokenizer": {"path": "unused"},
        "data": {"train": "unused", "document_masks": True},
        "parallel": {"tensor": tensor, "pipeline": pipeline, "zero": 3},
        "batch": {
            "global_samples": num_micro_batches * num_processes // (tensor * pipeline),
            "micro_samples": 1,
            "sequence_length": 16,
        },
        "optimizer": {"learning_rate": 1e-3, "clip": 0.0},
        "schedule": {"steps": STEPS, "warmup_steps": 0},
        **sections,
    }
    return Recipe.model_validate(values)


def name(layout: Layout) -> str:
    """As people write it."""
    context = f" x CP{layout.context}" if layout.context > 1 else ""
    return f"TP{layout.tensor} x PP{layout.pipeline} x DP{layout.data}{context}"


def check_layouts(run: Run, num_processes: int) -> Iterator[Finding]:
    """Each layout trains as one process does: loss, norm over the whole model, weights."""
    for tensor, pipeline in layouts(num_processes):
        config = recipe(num_processes, tensor, pipeline)
        yield judge(name(fit(config, num_processes)), run(train, config, STEPS), reference(config, STEPS), "")
    if num_processes % 2:
        text = f"{num_processes} processes can be data ranks only; tensor and pipeline ranks were not tried"
        yield Finding("TP, PP", "skipped", text)


def check_clipping(run: Run, num_processes: int) -> Iterator[Finding]:
    """Clipping by the norm of the whole model, whichever ranks hold its parts."""
    config = recipe(num_processes, *layouts(num_processes)[0], num_micro_batches=4, optimizer=CLIPPED)
    expected = reference(config, STEPS)
    assert min(expected.norms) > 10 * CLIPPED["clip"], "clipping must bite"
    cut = f"norm {expected.norms[0]:.3f} to {CLIPPED['clip']}: "
    yield judge("clipping", run(train, config, STEPS), expected, cut)


def judge(title: str, ranks: list[Outcome], expected: Outcome, head: str) -> Finding:
    """ok when loss, norm and weights are within the tolerance of one process."""
    off = compare(ranks, expected)
    figures = f"loss {off.loss:.0e}, norm {off.norm:.0e}, weights {off.weight:.0e}"
    right = max(off.loss, off.norm, off.weight) <= TOLERANCE
    return verdict(title, right, f"{head}{figures} off (tolerance {TOLERANCE:.0e})", MEND)


def check_masters(run: Run, num_processes: int) -> Iterator[Finding]:
    """bf16 training with fp32 masters: near fp32's loss, and steps too small for bf16 still move the weights."""
    config = recipe(num_processes, *layouts(num_processes)[0], precision="bf16", optimizer=SMALL_STEPS)
    yield judge_masters(config, run(train, config, 1), reference(config, 1))


def judge_masters(config: Recipe, ranks: list[Outcome], expected: Outcome) -> Finding:
    """ok when the loss is near and most weights of the matrices have moved."""
    loss = compare(ranks, expected).loss
    moved = total = 0
    for outcome in ranks:
        for parameter, weight in outcome.weights.items():
            # Not the embedding: rows of absent tokens stay. Not the norms: near 1, fp32 too has hardly so small a step.
            if weight.ndim == 2 and "embed" not in parameter:
                moved += int((weight != initial(config, parameter, outcome.parts[parameter])).sum())
                total += weight.numel()
    near = f"loss {loss:.0e} from fp32's (tolerance {BF16_LOSS_TOLERANCE:.0e})"
    text = f"{near}; a step of {SMALL_STEPS['learning_rate']:.0e} moves {moved / total:.0%} of the weights"
    return verdict("bf16, fp32 masters", loss <= BF16_LOSS_TOLERANCE and moved > 0.5 * total, text, MEND)


def initial(config: Recipe, parameter: str, part: Slice) -> torch.Tensor:
    """What a rank's part of the weights was at the start."""
    return part.take(initial_values(parameter, part, config.seed))
