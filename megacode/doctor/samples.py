"""What the compared trainings see: sample n, the same for whoever asks."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from megacode.data.stream import TrainStream
from megacode.model.layers import IGNORE
from megacode.parallel.pipeline import MicroBatch
from megacode.recipe import Recipe


class Samples(Protocol):
    """The samples of a training; those of step s are s * global_samples and the following."""

    def micro_batch(self, numbers: Sequence[int]) -> MicroBatch:
        """The samples of these numbers, whole sequences, on the CPU."""
        ...


class StreamSamples:
    """Those that the recipe's training sees."""

    def __init__(self, stream: TrainStream) -> None:
        self.stream = stream

    def micro_batch(self, numbers: Sequence[int]) -> MicroBatch:
        host = self.stream.micro_batch(numbers)
        tokens, labels, positions = map(torch.from_numpy, (host.tokens, host.labels, host.positions))
        bounds = None if host.cu_seqlens is None else host.cu_seqlens.tolist()
        return MicroBatch.whole(tokens, labels, positions, bounds)


class RandomSamples:
    """Random tokens and, where the recipe masks documents, two documents a sample.

    All is a function of the recipe's seed, the step and the sample's place in it. Samples have different numbers of
    labels with loss, so that a mean of means is not the mean.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._step = lru_cache(maxsize=1)(self._draw)

    def micro_batch(self, numbers: Sequence[int]) -> MicroBatch:
        step, first = divmod(numbers[0], self.recipe.batch.global_samples)
        rows = slice(first, first + len(numbers))
        tokens, labels, cuts = (values[rows] for values in self._step(step))
        batch, sequence = tokens.shape
        positions = torch.arange(sequence).repeat(batch, 1)
        if not self.recipe.data.document_masks:
            return MicroBatch.whole(tokens, labels, positions)
        positions = torch.where(positions < cuts, positions, positions - cuts)
        starts = torch.arange(batch)[:, None] * sequence + torch.cat((torch.zeros_like(cuts), cuts), dim=1)
        return MicroBatch.whole(tokens, labels, positions, [*starts.flatten().tolist(), batch * sequence])

    def _draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and labels [global_samples, sequence], and where the second document begins [global_samples, 1]."""
        generator = torch.Generator().manual_seed(1_000_003 * self.recipe.seed + step)
        count, length = self.recipe.batch.global_samples, self.recipe.batch.sequence_length
        vocabulary = self.recipe.model.vocabulary
        assert vocabulary is not None

        def draw(limit: int, *shape: int) -> Tensor:
            return torch.randint(0, limit, shape, generator=generator)

        tokens, labels = draw(vocabulary, count, length), draw(vocabulary, count, length)
        labels = labels.masked_fill(torch.arange(length) < draw(length, count, 1), IGNORE)
        return tokens, labels, draw(length, count, 1)
