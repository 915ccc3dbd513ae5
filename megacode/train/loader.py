"""A rank's micro-batches, made ahead of the steps that take them by worker processes of torch's DataLoader.

Which samples a step has follows from its number alone, so workers keep no state: a resumed run hands them other
numbers.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megacode.data.stream import MicroBatch as HostBatch
from megacode.data.stream import step_indices
from megacode.errors import UserError
from megacode.model.layers import IGNORE
from megacode.parallel.context import own_part
from megacode.parallel.mesh import Mesh
from megacode.parallel.pipeline import MicroBatch
from megacode.recipe import Recipe
from megacode.train.faults import SIGNALS

STEPS_AHEAD = 2
"""So many steps' micro-batches wait ready, at least; tokens of a step take a few MB."""


class Stream(Protocol):
    """What samples are read from."""

    def micro_batch(self, indices: Sequence[int]) -> HostBatch:
        """The samples of these numbers."""


@dataclass(frozen=True)
class Part:
    """What of a sample a rank needs."""

    context: int
    context_rank: int
    reads: bool
    """Whether it embeds tokens, computes losses or must know where documents begin; ranks of inner pipeline stages do
    not, unless there are document masks."""

    @staticmethod
    def of(mesh: Mesh, document_masks: bool) -> "Part":
        """This rank's."""
        at_an_end = mesh.pipeline_rank in (0, mesh.pipeline - 1)
        return Part(mesh.context, mesh.context_rank, at_an_end or document_masks)


@dataclass(frozen=True)
class Reader(Dataset[MicroBatch | UserError]):
    """Reads micro-batches as a rank needs them: numbers of samples -> its tokens of them, on the host."""

    stream: Stream
    part: Part
    sequence_length: int

    def __getitem__(self, numbers: list[int]) -> MicroBatch | UserError:
        """A user's mistake is a value: DataLoader would wrap an error in its worker's traceback."""
        try:
            return self.read(numbers)
        except UserError as error:
            return error

    def read(self, numbers: list[int]) -> MicroBatch:
        """The micro-batch of these samples.

        Raises:
            UserError: a shard is damaged.
        """
        whole = _on_host(self.stream.micro_batch(numbers)) if self.part.reads else self._blank(len(numbers))
        return own_part(whole, self.part.context, self.part.context_rank)

    def _blank(self, num_samples: int) -> MicroBatch:
        """Positions without tokens or labels."""
        shape = (num_samples, self.sequence_length)
        positions = torch.arange(self.sequence_length).expand(shape)
        labels = torch.full(shape, IGNORE)
        return MicroBatch.whole(torch.zeros_like(labels), labels, positions, None, torch.zeros_like(labels))


class Loader:
    """The micro-batches of the steps from a sample on, step by step. A context manager: its workers end with it.

    Args:
        reader: What reads them.
        steps: Numbers of the samples of each micro-batch, step by step, for as long as there are steps.
        per_step: Micro-batches of a step on this rank.
        workers: Processes that read ahead; 0: this process reads each when it is asked for.
    """

    def __init__(self, reader: Reader, steps: Iterator[list[list[int]]], per_step: int, workers: int) -> None:
        self._per_step = per_step
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=(numbers for step in steps for numbers in step),
            num_workers=workers,
            prefetch_factor=max(2, -(-STEPS_AHEAD * per_step // workers)) if workers else None,
            # Not fork: threads of the process group, of CUDA and of the heartbeat hold locks.
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else it would draw from the process's
        )
        with _signals_blocked():
            self._batches = iter(loader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        del self._batches  # ends the workers

    def step(self) -> list[MicroBatch]:
        """The next step's micro-batches.

        Raises:
            UserError: a shard is damaged.
            RuntimeError: a worker has died.
        """
        batches = []
        for _ in range(self._per_step):
            batch = self._next()
            if isinstance(batch, UserError):
                raise batch
            batches.append(batch)
        return batches

    def _next(self) -> MicroBatch | UserError:
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(f"data.workers: one has died, mostly for want of memory: {error}") from None


def load(recipe: Recipe, mesh: Mesh, stream: Stream, first: int, stop: int, workers: int) -> Loader:
    """A loader of this rank's samples from `first` to before `stop`, in batches of a step's size.

    Raises:
        UserError: the data ranks cannot share a step evenly.
    """
    size, micro = recipe.batch.global_samples, recipe.batch.micro_samples
    steps = (step_indices(at, size, micro, mesh.data, mesh.data_rank) for at in range(first, stop, size))
    reader = Reader(stream, Part.of(mesh, recipe.data.document_masks), recipe.batch.sequence_length)
    return Loader(reader, steps, size // (micro * mesh.data), workers)


def count_labels(batches: Sequence[MicroBatch], mesh: Mesh, num_groups: int) -> Tensor:
    """[num_groups] labels that count, by group, of this rank's part of a step; their sum over all ranks is the step's.

    Every tensor rank of the last stage holds the same labels, and the other stages need none: one rank counts them.
    """
    if mesh.tensor_rank != 0 or mesh.pipeline_rank != mesh.pipeline - 1:
        return torch.zeros(num_groups, dtype=torch.int64)
    counted = torch.cat([batch.groups[batch.labels != IGNORE] for batch in batches if batch.groups is not None])
    return torch.bincount(counted, minlength=num_groups)


def _on_host(batch: HostBatch) -> MicroBatch:
    """As tensors, with the group of each label."""
    groups = torch.from_numpy(2 * batch.sources[:, None] + batch.infilled)
    tokens, labels, positions = map(torch.from_numpy, (batch.tokens, batch.labels, batch.positions))
    bounds = None if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    return MicroBatch.whole(tokens, labels, positions, bounds, groups)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started within are deaf until they choose what a signal means: SLURM sends it to all of a step."""
    signals = (*SIGNALS, signal.SIGINT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(number: int) -> None:
    """Requests to stop are for the rank, which ends its workers; a worker whose rank is gone ends by itself."""
    for each in (*SIGNALS, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*SIGNALS, signal.SIGINT))
