"""Long texts in stretches: a tokenizer's memory and time do not grow with the square, or fiftyfold, of a document.

But for one without joints, which is given as a whole (30 bytes a character): such ones are told by `is_unbroken`.

SentencePiece's BPE merges neighbours whose union is a piece. Where no piece has two characters side by side, nothing is
ever merged across the joint between them, and what is on one side does not matter for the other: the ids of the whole
are those of the two sides, one behind the other. So it may be cut there, and nowhere else.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.engines import Engine, Ids
from megacode.data.tokenizer_json import SPACE, refusal

STRETCH = 1 << 20
"""Characters after which a text is cut at the next joint."""
LONGEST = 4 << 20
"""Characters of the longest stretch that preparing tokenizes."""
_FIRST, _MOST = 256, 1 << 16  # neighbours that are looked up at once: mostly the next joint is near
Pairs = NDArray[np.uint64]


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
    pairs = functools.cache(lambda: _pairs(model))  # most processes never meet a long text

    def whole(encode: Callable[[str], Ids]) -> Callable[[str], Ids]:
        def ids(text: str) -> Ids:
            if len(text) <= stretch:
                return encode(text)
            first, *others = _cut(text, stretch, pairs())
            return np.concatenate([encode(first), *map(engine.continuation, others)])

        return ids

    return dataclasses.replace(engine, document=whole(engine.document), continuation=whole(engine.continuation))


def is_unbroken(text: str, model: Any) -> bool:
    """Whether a text has a stretch of more than `LONGEST` characters, for a model that is given texts in stretches."""
    if len(text) <= LONGEST or refusal(model) is not None:
        return False
    return any(len(part) > LONGEST for part in _cut(text, STRETCH, _pairs(model)))


def _pairs(model: Any) -> Pairs:
    """Neighbouring characters of pieces, sorted; last a number above all of them."""
    pieces = (piece.piece for piece in model.pieces if piece.type not in (piece.BYTE, piece.CONTROL, piece.UNKNOWN))
    parted = "\ud800".join(pieces)  # which no text that has ids holds, so its pairs are no matter
    return np.append(np.unique(_neighbours(parted)), np.uint64(2**64 - 1))


def _neighbours(text: str) -> Pairs:
    """Each two neighbouring characters as one number. Returns: [characters - 1]."""
    # Lone surrogates are the engine's to refuse.
    codes = np.frombuffer(text.replace(" ", SPACE).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    return codes[:-1] << np.uint64(32) | codes[1:]


def _cut(text: str, stretch: int, pairs: Pairs) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = _next_joint(text, start + stretch, pairs)
        yield text[start:stop]
        start = stop


def _next_joint(text: str, place: int, pairs: Pairs) -> int:
    """The first place from `place` on that has a joint before it, or the text's end."""
    count = _FIRST
    while place < len(text):
        found = _neighbours(text[place - 1 : place + count])
        joints = np.flatnonzero(pairs[np.searchsorted(pairs, found)] != found)
        if joints.size:
            return place + int(joints[0])
        place, count = place + count, min(2 * count, _MOST)
    return len(text)
