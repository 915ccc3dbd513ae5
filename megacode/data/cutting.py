"""How a source is cut into samples: as the paper does it, all documents laid end to end and cut where a sample is
full."""

from collections import Counter
from typing import Protocol

import numpy as np

from megacode.data.infill import Infiller
from megacode.data.packing import Kind, Piece
from megacode.data.source import Source
from megacode.data.windows import Windows


class Cutter(Protocol):
    """The samples of a source.

    Attributes:
        per_epoch: How many there are of an epoch, the same for all.
    """

    @property
    def per_epoch(self) -> int: ...

    def pieces(self, sample: int, counts: Counter[str]) -> list[Piece]:
        """Pieces of a sample, sequence_length + 1 tokens in all; `counts` is told what becomes of documents."""
        ...


class Concatenated:
    """Samples are windows of the source in which the documents that no end of the sample cuts become infilling
    documents (Code Llama section 2.3: only documents that are not cut across contexts).

    They are longer than they were, so what follows them is cut earlier than the window's end; but only a plain document
    is ever cut. The few tokens that are pushed out are not seen in that epoch; other epochs cut elsewhere.
    """

    def __init__(self, source: Source, sequence_length: int, key: int, infiller: Infiller) -> None:
        self.windows = Windows(source.num_tokens, sequence_length, key)
        self._source, self._key, self._infiller = source, key, infiller

    @property
    def per_epoch(self) -> int:
        return self.windows.per_epoch

    def pieces(self, sample: int, counts: Counter[str]) -> list[Piece]:
        epoch, start = self.windows.locate(sample)
        room = self.windows.sequence_length + 1
        pieces: list[Piece] = []
        for document, low, high in self._source.documents_from(start):
            piece = None
            if low >= start and high - low <= room and self._infiller.rate:
                piece = self._infilled(document, high - low, epoch, room, counts)
            if piece is None:
                piece = plain(self._source, document, low, max(low, start), min(high, max(low, start) + room), high)
            pieces.append(piece)
            room -= len(piece.ids)
            if not room:
                return pieces
        # Documents got shorter, which is rare, and the source is at its end: there is nothing to go on with.
        counts.clear()
        return window(self._source, start, start + self.windows.sequence_length + 1)

    def _infilled(self, document: int, length: int, epoch: int, room: int, counts: Counter[str]) -> Piece | None:
        found = self._infiller.infilled(self._source, document, self._key, epoch, room, counts)
        return found and Piece(found[0], found[1], document=document, stop=length)


def window(source: Source, start: int, stop: int) -> list[Piece]:
    """The pieces of a stretch of a source, as they are."""
    pieces: list[Piece] = []
    for document, low, high in source.documents_from(start):
        if low >= stop:
            break
        pieces.append(plain(source, document, low, max(low, start), min(high, stop), high))
    return pieces


def plain(source: Source, document: int, low: int, start: int, stop: int, high: int) -> Piece:
    """Tokens start..stop-1 of the source, of a document that lies at low..high-1; it begins a segment where the
    document does."""
    ids = source.tokens(start, stop).astype(np.int64)
    unpredicted = None
    if (spans := source.spans(document)) is not None:
        shifted = np.clip(spans - (start - low), 0, stop - start)
        unpredicted = shifted[shifted[:, 0] < shifted[:, 1]]
    kind: Kind = "whole" if low == start and high == stop else "cut"
    return Piece(ids, kind, start == low, document, start - low, stop - low, unpredicted)
