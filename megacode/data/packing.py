"""From stretches of documents to samples, and from samples to micro-batches: labels, positions, boundaries."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
"""The label of a position that has no loss."""

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """A document, or what of one lies in a window."""

    ids: Int64Array  # [tokens]
    starts: bool
    """Whether its first token is its document's first."""
    infilled: bool = False


@dataclass(frozen=True)
class Sample:
    """One sequence of a batch."""

    tokens: Int64Array  # [sequence]
    labels: Int64Array  # [sequence]; IGNORE where there is no loss
    positions: Int64Array  # [sequence]
    document_starts: Int64Array  # [documents]; where in `tokens` a document begins, rising
    infilled: NDArray[np.bool_]  # [sequence]; labels that belong to an infilling document
    source: int = 0
    """Which of the stream's sources it is from."""


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the model together, whole: what context ranks hold of them is cut later."""

    tokens: Int64Array  # [batch, sequence]
    labels: Int64Array  # [batch, sequence]; IGNORE where there is no loss
    positions: Int64Array  # [batch, sequence]
    infilled: NDArray[np.bool_]  # [batch, sequence]; labels that belong to an infilling document
    sources: Int64Array  # [batch]; which of the stream's sources each sample is from
    cu_seqlens: NDArray[np.int32] | None  # [segments + 1], over batch * sequence tokens; None without document masks


def join(pieces: Sequence[Piece], sequence_length: int, document_masks: bool) -> Sample:
    """Lay pieces end to end, sequence_length + 1 tokens in all, and make a sample of them.

    With document masks positions restart where a document starts, and no document predicts the first token of the next
    one. Without them positions are 0..sequence_length-1 and every label counts.
    """
    ids = np.concatenate([piece.ids for piece in pieces])  # [sequence + 1]
    assert len(ids) == sequence_length + 1
    lengths = np.array([len(piece.ids) for piece in pieces])
    begins = np.cumsum(lengths) - lengths
    starts = begins[[piece.starts and len(piece.ids) > 0 for piece in pieces]].astype(np.int64)  # [documents]
    infilled = np.repeat([piece.infilled for piece in pieces], lengths)[1:]  # [sequence]
    labels = ids[1:].copy()
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
    return MicroBatch(
        tokens=np.stack([sample.tokens for sample in samples]),
        labels=np.stack([sample.labels for sample in samples]),
        positions=np.stack([sample.positions for sample in samples]),
        infilled=np.stack([sample.infilled for sample in samples]),
        sources=np.array([sample.source for sample in samples], np.int64),
        cu_seqlens=cu_seqlens,
    )
