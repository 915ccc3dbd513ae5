"""Does a recipe fit a number of processes? Pure arithmetic, no torch: train, tools and tests ask the same functions."""

from dataclasses import dataclass

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

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.pipeline * self.data * self.tensor


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
    model_ranks = parallel.tensor * parallel.pipeline
    if world_size % model_ranks:
        raise UserError(
            f"{world_size} processes can't be shared by parallel.tensor ({parallel.tensor}) x parallel.pipeline "
            f"({parallel.pipeline}); start a multiple of {model_ranks}, or change the two"
        )
    data = world_size // model_ranks
    _check_tensor(recipe)
    per_micro_batch = data * batch.micro_samples
    if batch.global_samples % per_micro_batch:
        raise UserError(
            f"batch.global_samples ({batch.global_samples}) is not a multiple of data ranks ({data}) x "
            f"batch.micro_samples ({batch.micro_samples}); the next one up is "
            f"{-(-batch.global_samples // per_micro_batch) * per_micro_batch}"
        )
    num_micro_batches = batch.global_samples // per_micro_batch
    num_stages = parallel.pipeline * parallel.virtual_stages
    if num_stages > recipe.model.layers:
        raise UserError(
            f"model.layers ({recipe.model.layers}) are fewer than parallel.pipeline x parallel.virtual_stages "
            f"({num_stages}): each stage needs a layer; lower the stages to {recipe.model.layers} or fewer"
        )
    if parallel.virtual_stages > 1 and num_micro_batches % parallel.pipeline:
        raise UserError(
            f"interleaved stages need the {num_micro_batches} micro-batches of a step to be a multiple of "
            f"parallel.pipeline ({parallel.pipeline}); change batch.global_samples, or set parallel.virtual_stages: 1"
        )
    stages = tuple(split_layers(recipe.model.layers, num_stages))
    return Layout(parallel.pipeline, data, parallel.tensor, parallel.virtual_stages, num_micro_batches, stages)


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
