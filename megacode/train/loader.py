"""A rank's micro-batches, made ahead of the steps that take them by worker processes of torch's DataLoader.

Which samples a step has follows from its number alone, so workers keep no state: a resumed run hands them other
numbers.
"""

import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
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


OUTCOMES = ("uncut", "infilled", "irreversible", "unfitting", "spanned")
"""What becomes of documents of a step (see `Infiller`)."""


class Stream(Protocol):
    """What samples are read from."""

    def micro_batch(self, indices: Sequence[int]) -> HostBatch:
        """The samples of these numbers."""


@dataclass(frozen=True)
class Positions:
    """Samples of which nothing is read: what inner pipeline stages need where no document has a mask."""

    sequence_length: int

    def micro_batch(self, indices: Sequence[int]) -> HostBatch:
        """Positions without labels."""
        shape = (len(indices), self.sequence_length)
        positions = np.broadcast_to(np.arange(self.sequence_length), shape).copy()
        nothing = np.zeros(shape, np.int64)
        sources = np.zeros(len(indices), np.int64)
        return HostBatch(nothing, nothing + IGNORE, positions, np.zeros(shape, bool), sources, cu_seqlens=None)


@dataclass(frozen=True)
class Reader(Dataset[HostBatch | UserError]):
    """Numbers of samples -> the micro-batch of these, in whatever process.

    Arrays and not tensors, of which each would go from a worker to its rank as a file in shared memory.
    """

    stream: Stream

    def __getitem__(self, numbers: list[int]) -> HostBatch | UserError:
        """A user's mistake is a value: DataLoader would wrap an error in its worker's traceback."""
        try:
            return self.stream.micro_batch(numbers)
        except UserError as error:
            return error


class Loader:
    """The micro-batches of the steps from a sample on, step by step. A context manager: its workers end with it.

    Args:
        stream: What they are read from.
        steps: Numbers of the samples of each micro-batch, step by step, for as long as there are steps.
        per_step: Micro-batches of a step on this rank.
        workers: Processes that read ahead; 0: this process reads each when it is asked for.
        context: Context ranks, which share each sample, and which of them this is.

    Attributes:
        documents: What became of documents of the samples of the last step that was asked for.
    """

    def __init__(
        self,
        stream: Stream,
        steps: Iterator[list[list[int]]],
        per_step: int,
        workers: int,
        context: tuple[int, int] = (1, 0),
    ) -> None:
        self._per_step, self._context = per_step, context
        self.documents: Counter[str] = Counter()
        loader = DataLoader(
            Reader(stream),
            batch_size=None,
            sampler=(numbers for step in steps for numbers in step),
            collate_fn=_as_it_is,
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
        batches, self.documents = [], Counter()
        for _ in range(self._per_step):
            batch = self._next()
            if isinstance(batch, UserError):
                raise batch
            self.documents += batch.counts
            batches.append(own_part(_on_host(batch), *self._context))
        return batches

    def _next(self) -> HostBatch | UserError:
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                "data.workers: one has died, mostly for want of memory, or (bus error) since a shard's .idx or .spans "
                f"was cut short: {error}"
            ) from None


def load(recipe: Recipe, mesh: Mesh, stream: Stream, first: int, stop: int, workers: int) -> Loader:
    """A loader of this rank's samples from `first` to before `stop`, in batches of a step's size.

    Ranks that embed tokens, compute losses or must know where documents begin read them; the others do not.

    Raises:
        UserError: the data ranks cannot share a step evenly.
    """
    size, micro = recipe.batch.global_samples, recipe.batch.micro_samples
    steps = (step_indices(at, size, micro, mesh.data, mesh.data_rank) for at in range(first, stop, size))
    per_step, context = size // (micro * mesh.data), (mesh.context, mesh.context_rank)
    if mesh.pipeline_rank in (0, mesh.pipeline - 1) or recipe.data.document_masks:
        return Loader(stream, steps, per_step, workers, context)
    return Loader(Positions(recipe.batch.sequence_length), steps, per_step, 0, context)


def count_labels(batches: Sequence[MicroBatch], mesh: Mesh, num_groups: int) -> Tensor:
    """[num_groups] labels that count, by group, of this rank's part of a step; their sum over all ranks is the step's.

    Every tensor rank of the last stage holds the same labels, and the other stages need none: one rank counts them.
    """
    if mesh.tensor_rank != 0 or mesh.pipeline_rank != mesh.pipeline - 1:
        return torch.zeros(num_groups, dtype=torch.int64)
    counted = torch.cat([batch.groups[batch.labels != IGNORE] for batch in batches if batch.groups is not None])
    return torch.bincount(counted, minlength=num_groups)


def count_documents(documents: Counter[str], mesh: Mesh) -> Tensor:
    """[OUTCOMES] documents by what became of them, of this rank's part of a step; their sum over all ranks is the
    step's. Tensor and context ranks read the same samples as each other, and so do pipeline stages: one rank counts.
    """
    counts = mesh.tensor_rank == mesh.context_rank == 0 and mesh.pipeline_rank == 0
    return torch.tensor([documents[outcome] if counts else 0 for outcome in OUTCOMES])


def _as_it_is(batch: Any) -> Any:
    return batch


def _on_host(batch: HostBatch) -> MicroBatch:
    """As tensors, with the group of each label."""
    groups = torch.from_numpy(2 * batch.sources[:, None] + batch.infilled)
    tokens, labels, positions = map(torch.from_numpy, (batch.tokens, batch.labels, batch.positions))
    bounds = None if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    return MicroBatch.whole(tokens, labels, positions, bounds, groups)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started within are deaf until they choose what a signal means: SLURM sends it to all of a step."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(number: int) -> None:
    """Requests to stop are for the rank, which ends its workers; a worker whose rank is gone ends by itself."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
