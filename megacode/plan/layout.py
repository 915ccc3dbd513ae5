"""Does a recipe fit a number of processes? Pure arithmetic, no torch: train, tools and tests ask the same functions."""

from dataclasses import dataclass
from itertools import accumulate

from megacode.errors import UserError
from megacode.parallel.stages import split_layers
from megacode.recipe import Recipe

VOCABULARY_MULTIPLE = 8
"""Rows of embedding and head per tensor rank are padded to a multiple of this (16-byte rows of bf16 logits)."""


@dataclass(frozen=True)
class Layout:
    """How the processes share the work; the product of the axes is the world size."""

    pipeline: int
    data: int
    tensor: int
    virtual_stages: int
    num_micro_batches: int
    """Micro-batches of one data rank in one optimizer step."""
    stages: tuple[range, ...]
    """Layers of each virtual stage, in model order; stage s stands on pipeline rank s mod pipeline."""
    context: int = 1

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def zero_size(self) -> int:
        """Ranks over which ZeRO shards and gradients are summed: data x context."""
        return self.data * self.context


def vocabulary_rows(vocabulary: int, tensor: int) -> int:
    """Rows of the embedding and the head that each tensor rank holds, padding included."""
    rows = -(-vocabulary // tensor)
    return rows if tensor == 1 else -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def fit(recipe: Recipe, world_size: int) -> Layout:
    """Fit a recipe to a number of processes.

    Raises:
        UserError: the world size, the heads, the layers or the batch can't be divided so; names the keys and the mend.
    """
    parallel, batch = recipe.parallel, recipe.batch
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_ranks:
        context = f" x parallel.context ({parallel.context})" if parallel.context > 1 else ""
        raise UserError(
            f"{world_size} processes can't be shared by parallel.tensor ({parallel.tensor}) x parallel.pipeline "
            f"({parallel.pipeline}){context}; start a multiple of {model_ranks}, or change these"
        )
    data = world_size // model_ranks
    _check_tensor(recipe)
    _check_sequence(recipe)
    per_micro_batch = data * batch.micro_samples
    if batch.global_samples % per_micro_batch:
        raise UserError(
            f"batch.global_samples ({batch.global_samples}) is not a multiple of data ranks ({data}) x "
            f"batch.micro_samples ({batch.micro_samples}); the next one up is "
            f"{-(-batch.global_samples // per_micro_batch) * per_micro_batch}"
        )
    num_micro_batches = batch.global_samples // per_micro_batch
    if parallel.virtual_stages > 1 and num_micro_batches % parallel.pipeline:
        raise UserError(
            f"interleaved stages need the {num_micro_batches} micro-batches of a step to be a multiple of "
            f"parallel.pipeline ({parallel.pipeline}); change batch.global_samples, or set parallel.virtual_stages: 1"
        )
    return Layout(
        parallel.pipeline, data, parallel.tensor, parallel.virtual_stages, num_micro_batches, _stages(recipe),
        parallel.context,
    )  # fmt: skip


def _stages(recipe: Recipe) -> tuple[range, ...]:
    parallel, layers = recipe.parallel, recipe.model.layers
    num_stages = parallel.pipeline * parallel.virtual_stages
    if num_stages > layers:
        raise UserError(
            f"model.layers ({layers}) are fewer than parallel.pipeline x parallel.virtual_stages "
            f"({num_stages}): each stage needs a layer; lower the stages to {layers} or fewer"
        )
    if isinstance(parallel.stages, str):
        return tuple(split_layers(layers, num_stages, ends=1 if parallel.stages == "weighed" else 0))
    if min(parallel.stages) < 1 or sum(parallel.stages) != layers:
        raise UserError(
            f"parallel.stages {parallel.stages} must be positive numbers that add up to model.layers ({layers})"
        )
    stops = list(accumulate(parallel.stages))
    return tuple(range(stop - count, stop) for stop, count in zip(stops, parallel.stages, strict=True))


def _check_sequence(recipe: Recipe) -> None:
    parallel, length = recipe.parallel, recipe.batch.sequence_length
    # Zig-zag: each context rank holds two chunks, one from the front and one from the back.
    parts = (2 * parallel.context if parallel.context > 1 else 1) * (parallel.tensor if parallel.sequence else 1)
    if length % parts:
        keys = " x ".join(["2 x parallel.context"] * (parallel.context > 1) + ["parallel.tensor"] * parallel.sequence)
        raise UserError(
            f"batch.sequence_length ({length}) must be a multiple of {keys} ({parts}), since ranks share each "
            f"sequence; the next one up is {-(-length // parts) * parts}"
        )


def _check_tensor(recipe: Recipe) -> None:
    model, tensor = recipe.model, recipe.parallel.tensor
    for key, count in (("heads", model.heads), ("kv_heads", model.kv_heads), ("ffn", model.ffn)):
        if count % tensor:
            raise UserError(
                f"model.{key} ({count}) can't be split over parallel.tensor ({tensor}); "
                f"take a parallel.tensor that divides {count}"
            )
    vocabulary = model.vocabulary
    if vocabulary is not None and vocabulary_rows(vocabulary, tensor) * (tensor - 1) >= vocabulary:
        raise UserError(
            f"model.vocabulary ({vocabulary}) leaves a tensor rank without rows at parallel.tensor ({tensor}); lower it"
        )
