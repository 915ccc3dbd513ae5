"""Tokens as a person can read them: runs of text, with what each is of an infilling document and whether it has loss.

The runs' text is that of `Tokenizer.decode`, with the control pieces as markers between it: <s>, <PRE>, <SUF>, <MID>,
<EOT>, </s>. A character that lies across several tokens belongs to the run in which it ends.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megacode.data.packing import Int64Array, Kind
from megacode.data.tokenizer import Tokenizer

Role = Literal["text", "prefix", "middle", "suffix", "marker", "padding"]
"""What a run is: text of a plain document, a part of an infilling document, a control piece, or padding."""


@dataclass(frozen=True)
class Run:
    """Text that is all of one kind."""

    text: str
    role: Role
    loss: bool
    """Whether its tokens are predicted."""


def runs(
    ids: Int64Array, kind: Kind, cuts: tuple[int, int] | None, loss: NDArray[np.bool_], tokenizer: Tokenizer
) -> list[Run]:
    """The runs of a piece of a sample.

    Args:
        ids: its tokens, all rows of the tokenizer: [tokens].
        kind: what it is.
        cuts: of an infilling document: the characters of its text that the middle begins with and ends before.
        loss: which tokens are predicted: [tokens].
        tokenizer: the one that made the tokens.
    """
    if kind == "padding":
        return [Run(f"<{len(ids)} tokens of padding>", "padding", False)]
    pre, suf, mid = tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id
    openers: dict[int | None, Role] = {pre: "prefix", suf: "suffix", mid: "middle"}
    first = {"PSM": pre, "SPM": mid}.get(kind, tokenizer.bos)
    found: list[Run] = []
    role: Role = "text"
    opened: int | None = None
    for is_marker, group in groupby(range(len(ids)), lambda place: tokenizer.is_control(int(ids[place]))):
        places = list(group)
        if is_marker:
            for place in places:
                opened = int(ids[place])
                name = tokenizer.piece(opened).removeprefix("▁")
                found.append(Run(name, "marker", bool(loss[place])))
                if kind in ("PSM", "SPM") and opened in openers:
                    role = openers[opened]
            continue
        texts = list(_texts(tokenizer.texts(ids[places].tolist()), loss[places].tolist(), role))
        if opened is not None and opened == first:  # SentencePiece's dummy prefix
            texts[0] = replace(texts[0], text=texts[0].text.removeprefix(" "))
        if kind == "SPM" and role == "middle" and cuts is not None:
            texts = list(_divided(texts, cuts[0]))
        found += [run for run in texts if run.text]
    return found


def _texts(texts: Sequence[bytes], loss: Sequence[bool], role: Role) -> Iterator[Run]:
    """Text between two control pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for predicted, group in groupby(zip(texts, loss, strict=True), lambda pair: pair[1]):
        yield Run(decoder.decode(b"".join(text for text, _ in group)), role, predicted)
    if rest := decoder.decode(b"", final=True):
        yield Run(rest, role, bool(loss[-1]))


def _divided(texts: Sequence[Run], characters: int) -> Iterator[Run]:
    """The same runs, of which the first characters are the prefix's: in SPM order it and the middle are one text."""
    for run in texts:
        yield replace(run, text=run.text[:characters], role="prefix")
        yield replace(run, text=run.text[characters:])
        characters = max(0, characters - len(run.text))
