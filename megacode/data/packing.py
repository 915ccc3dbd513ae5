"""From pieces of documents to samples, and from samples to micro-batches: labels, positions, boundaries."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""The label of a position that has no loss."""

Int64Array = NDArray[np.int64]

Kind = Literal["whole", "cut", "PSM", "SPM", "padding"]
"""What a piece is: a document, a part of one, an infilling document in either order, or nothing."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, what of one lies in a sample, or padding."""

    ids: Int64Array  # [tokens]
    kind: Kind = "whole"
    begins: bool = True
    """Whether it begins a segment: with document masks it and what precedes it know nothing of each other."""
    document: int = -1
    """Its document's number in the source."""
    start: int = 0
    """Which token of its document it begins with."""
    stop: int = 0
    """Which token of its document it ends before."""
    unpredicted: NDArray[np.integer[Any]] | None = None  # [spans, start and stop]
    """Its tokens that are not to be predicted; None where all are."""

    @property
    def infilled(self) -> bool:
        """Whether it is an infilling document."""
        return self.kind == "PSM" or self.kind == "SPM"


def padding(num_tokens: int) -> Piece:
    """A piece that nothing is predicted in."""
    return Piece(np.zeros(num_tokens, np.int64), "padding", unpredicted=np.array([[0, num_tokens]]))


@dataclass(frozen=True)
class Sample:
    """One sequence of a batch."""

    tokens: Int64Array  # [sequence]
    labels: Int64Array  # [sequence]; IGNORE where there is no loss
    positions: Int64Array  # [sequence]
    document_starts: Int64Array  # [segments]; where in `tokens` a document, a piece of one or padding begins, rising
    infilled: NDArray[np.bool_]  # [sequence]; labels that belong to an infilling document
    source: int = 0
    """Which of the stream's sources it is from."""
    counts: Counter[str] = field(default_factory=Counter)
    """What became of its documents (see `Infiller`), and its tokens of `padding`."""


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the model together, whole: what context ranks hold of them is cut later."""

    tokens: Int64Array  # [batch, sequence]
    labels: Int64Array  # [batch, sequence]; IGNORE where there is no loss
    positions: Int64Array  # [batch, sequence]
    infilled: NDArray[np.bool_]  # [batch, sequence]; labels that belong to an infilling document
    sources: Int64Array  # [batch]; which of the stream's sources each sample is from
    cu_seqlens: NDArray[np.int32] | None  # [segments + 1], over batch * sequence tokens; None without document masks
    counts: Counter[str] = field(default_factory=Counter)
    """Those of the samples, summed."""


def join(pieces: Sequence[Piece], sequence_length: int, document_masks: bool) -> Sample:
    """Lay pieces end to end, sequence_length + 1 tokens in all, and make a sample of them.

    With document masks positions restart where a segment begins, and no segment predicts the first token of the next
    one. Without them positions are 0..sequence_length-1 and every label counts that its piece does not exclude.
    """
    ids = np.concatenate([piece.ids for piece in pieces])  # [sequence + 1]
    assert len(ids) == sequence_length + 1
    lengths = np.array([len(piece.ids) for piece in pieces])
    begins = np.cumsum(lengths) - lengths
    starts = begins[[piece.begins and len(piece.ids) > 0 for piece in pieces]].astype(np.int64)  # [segments]
    infilled = np.repeat([piece.infilled for piece in pieces], lengths)[1:]  # [sequence]
    labels = ids[1:].copy()
    for piece, begin in zip(pieces, begins.tolist(), strict=True):
        if piece.unpredicted is not None:
            for start, stop in piece.unpredicted.tolist():
                labels[max(0, begin + start - 1) : max(0, begin + stop - 1)] = IGNORE
    positions = np.arange(sequence_length, dtype=np.int64)
    document_starts = starts[starts < sequence_length]
    if document_masks:
        labels[starts[starts > 0] - 1] = IGNORE
        segment_starts = np.zeros(sequence_length, np.int64)
        segment_starts[document_starts] = document_starts
        positions -= np.maximum.accumulate(segment_starts)
    return Sample(ids[:-1], labels, positions, document_starts, infilled & (labels != IGNORE))


def collate(samples: Sequence[Sample], document_masks: bool) -> MicroBatch:
    """Stack samples of equal length. With document masks a segment begins at every document and at every sample."""
    cu_seqlens = None
    if document_masks:
        length = len(samples[0].tokens)
        starts = [row * length + np.union1d(sample.document_starts, [0]) for row, sample in enumerate(samples)]
        cu_seqlens = np.concatenate([*starts, [len(samples) * length]]).astype(np.int32)
    counts: Counter[str] = Counter()
    for sample in samples:
        counts += sample.counts
    return MicroBatch(
        tokens=np.stack([sample.tokens for sample in samples]),
        labels=np.stack([sample.labels for sample in samples]),
        positions=np.stack([sample.positions for sample in samples]),
        infilled=np.stack([sample.infilled for sample in samples]),
        sources=np.array([sample.source for sample in samples], np.int64),
        cu_seqlens=cu_seqlens,
        counts=counts,
    )
