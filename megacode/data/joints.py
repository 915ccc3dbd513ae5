"""Long texts in stretches: a tokenizer's memory and time do not grow with the square, or fiftyfold, of a document.

SentencePiece's BPE merges neighbours whose union is a piece. Where no piece has two characters side by side, nothing is
ever merged across the joint between them, and what is on one side does not matter for the other: the ids of the whole
are those of the two sides, one behind the other. So it may be cut there, and nowhere else.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megacode.data.engines import Engine, Ids
from megacode.data.tokenizer_json import SPACE, refusal

STRETCH = 1 << 20
"""Characters after which a text is cut at the next joint."""


def in_stretches(engine: Engine, model: Any, stretch: int = STRETCH) -> Engine:
    """An engine that gives the same ids, and long texts to `engine` in stretches.

    Models that do more to a text than to make spaces visible, or merge by other rules, are left as they are.

    Args:
        engine: Computes ids.
        model: Its ModelProto.
        stretch: About how many characters are given at a time.
    """
    if refusal(model) is not None:
        return engine
    pairs: set[str] = set()

    def whole(encode: Callable[[str], Ids]) -> Callable[[str], Ids]:
        def ids(text: str) -> Ids:
            if len(text) <= stretch:
                return encode(text)
            if not pairs:
                pairs.update(_pairs(model))
            first, *others = _cut(text, stretch, pairs)
            return np.concatenate([encode(first), *map(engine.continuation, others)])

        return ids

    return dataclasses.replace(engine, document=whole(engine.document), continuation=whole(engine.continuation))


def _pairs(model: Any) -> Iterator[str]:
    """Neighbouring characters of pieces."""
    for piece in model.pieces:
        if piece.type not in (piece.BYTE, piece.CONTROL, piece.UNKNOWN):
            yield from map("".join, zip(piece.piece, piece.piece[1:], strict=False))


def _cut(text: str, stretch: int, pairs: set[str]) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = start + stretch
        while stop < len(text) and text[stop - 1 : stop + 1].replace(" ", SPACE) in pairs:
            stop += 1
        yield text[start:stop]
        start = stop
