"""What all contestants of a benchmark train: shapes, tokens, initial weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megacode.errors import UserError
from megacode.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

SEED = 7
LOSS_TOLERANCE = 1e-4
"""Largest relative difference of a step's losses between contestants: beyond it they do not train the same."""

SHAPES: dict[str, dict[str, Any]] = {
    # 0.2 million parameters: the tool's own test.
    "nano": {"model": {"preset": "nano", "vocabulary": 512}, "micro_samples": 1, "sequence_length": 32},
    # 0.1 million, with heads for eight tensor ranks: its sums and gathers cost more than its products.
    "atom": {
        "model": {"layers": 2, "hidden": 64, "heads": 8, "kv_heads": 8, "ffn": 128, "vocabulary": 512},
        "micro_samples": 1, "sequence_length": 32,
    },
    # 3.4 million, MHA: the demo's model.
    "micro": {"model": {"preset": "micro", "vocabulary": 4112}, "micro_samples": 2, "sequence_length": 512},
    # 31.6 million, GQA.
    "mini": {
        "model": {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 4, "ffn": 1376, "vocabulary": 8192},
        "micro_samples": 1, "sequence_length": 256,
    },
}  # fmt: skip
"""Name -> the model, and the micro-batch that goes with it."""

Step = Callable[["list[tuple[Tensor, Tensor]]"], float]
"""One optimizer step over this rank's micro-batches (tokens, labels), each [batch, sequence] int64; returns this
rank's mean loss."""


def contest_recipe(
    shape: str, num_micro_batches: int, parallel: dict[str, Any], processes: int, micro_samples: int | None = None
) -> Recipe:
    """The shape's training, fp32, `num_micro_batches` to a step on each of `processes` data ranks.

    Args:
        shape: one of `SHAPES`.
        num_micro_batches: of a data rank.
        parallel: the recipe's section.
        processes: data ranks.
        micro_samples: instead of the shape's.

    Raises:
        UserError: there is no such shape.
    """
    if shape not in SHAPES:
        raise UserError(f"--shape {shape} is unknown; known are {', '.join(SHAPES)}")
    sizes = SHAPES[shape]
    micro_samples = micro_samples or sizes["micro_samples"]
    return Recipe.model_validate(
        {
            "run": "unused",
            "seed": SEED,
            "precision": "fp32",
            "model": sizes["model"],
            "tokenizer": {"path": "unused"},
            "data": {"train": "unused"},
            "parallel": parallel,
            "batch": {
                "global_samples": micro_samples * num_micro_batches * processes,
                "micro_samples": micro_samples,
                "sequence_length": sizes["sequence_length"],
            },
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"steps": 10**6},
        }
    )


def check_losses(step: int, losses: dict[str, float]) -> None:
    """Compare contestants' (name -> loss) losses of a step, counted from 1, with the first one's.

    Raises:
        RuntimeError: one differs.
    """
    first, expected = next(iter(losses.items()))
    for name, loss in losses.items():
        if not abs(loss - expected) <= LOSS_TOLERANCE * abs(expected):
            raise RuntimeError(
                f"step {step}: the loss of {name} is {loss:.6f} and that of {first} {expected:.6f}; they do not train "
                f"the same, so there is nothing to compare"
            )


def layout_words(parallel: dict[str, Any]) -> str:
    """A recipe's section `parallel` for a table's cell."""
    return ", ".join(key if value is True else f"{key} {value}" for key, value in parallel.items())


def step_batches(recipe: Recipe, step: int, rank: int, processes: int) -> list[tuple[Tensor, Tensor]]:
    """A rank's micro-batches of a step: (tokens, labels), each [micro_samples, sequence] int64.

    The whole step's samples are a function of its number. Small ids are more frequent, so that there is something to
    learn and a wrong update shows in the next losses.
    """
    import torch

    batch, vocabulary = recipe.batch, recipe.model.vocabulary
    assert vocabulary is not None
    generator = torch.Generator().manual_seed(1000 + step)
    uniform = torch.rand(batch.global_samples, batch.sequence_length + 1, generator=generator)
    ids = (uniform**3 * vocabulary).long()
    mine = ids.split(batch.micro_samples)[rank::processes]
    return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in mine]


def initial_weights(recipe: Recipe, device: str = "cpu") -> Iterator[tuple[str, Tensor, bool]]:
    """(name, whole fp32 value, whether weight decay applies) of each parameter: one at a time, to keep the peak low.

    On a GPU they are drawn there, other ones: a CPU would take a minute for some billions.
    """
    import torch

    from megacode.model.layers import initial_values, part_of
    from megacode.model.llama import Llama

    with torch.device("meta"):
        parts = {name: part_of(parameter) for name, parameter in Llama(recipe.model).named_parameters()}
    for number, (name, part) in enumerate(parts.items()):
        if device == "cpu" or part.std == 0:
            yield name, initial_values(name, part, recipe.seed).to(device), part.std > 0
        else:
            generator = torch.Generator(device).manual_seed(recipe.seed + number)
            yield name, torch.empty(part.shape, device=device).normal_(0.0, part.std, generator=generator), True
