"""Infilling documents: cut a text at two characters and move its middle to the end (Code Llama 2.3, FIM App. D).

With enc = `Tokenizer.encode` and enc0 = `Tokenizer.encode_continuation` (no dummy prefix) the two orders are

    PSM   BOS PRE enc(prefix) SUF enc0(suffix) MID enc0(middle) EOT EOS
    SPM   BOS PRE SUF enc0(suffix) MID enc(prefix + middle) EOT EOS

SPM is the paper's "compatible" variant: it is what PSM becomes with an empty prefix. Prefix and middle are encoded as
one text there, so no token is split at their joint. That a training document ends in EOS after EOT is a choice of ours:
the authors say that training documents have BOS and EOS, but not whether those of infilling do.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megacode.data.counter import Purpose, below, chance, draw, key_of
from megacode.data.packing import Int64Array, Kind
from megacode.data.shards import IntArray
from megacode.data.source import Source
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError


class Infiller:
    """Decides which documents become infilling documents, and makes them.

    Decision, cuts and order are a function of (key, epoch, document) alone. What becomes of the documents that lie
    whole in their sample is counted: `uncut`, of these `infilled`, `irreversible` (chosen, but their ids do not come
    back from their text), `unfitting` (chosen, but longer than their sample has room for) and `spanned` (chosen, but
    with loss spans, which an infilling document would lose).

    Args:
        rate: Share of the uncut documents; 0 draws nothing.
        suffix_first_rate: Share of the infilling documents in SPM order.

    Raises:
        UserError: the tokenizer has no infilling pieces.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float, suffix_first_rate: float) -> None:
        if rate > 0 and not tokenizer.has_infilling:
            raise UserError(f"the tokenizer {tokenizer.path} has no infilling pieces; set data.infilling_rate to 0")
        self.rate = rate
        self._tokenizer, self._suffix_first_rate = tokenizer, suffix_first_rate

    def infilled(
        self, source: Source, document: int, key: int, epoch: int, room: int, counts: Counter[str]
    ) -> tuple[Int64Array, Kind] | None:
        """The infilling document that an uncut document becomes, and its order; None where it stays plain.

        Args:
            key: Of the source in this run.
            room: How many tokens it may have.
            counts: What is counted.
        """
        if self.rate == 0:
            return None
        counts["uncut"] += 1
        if not chance(draw(key_of(key, epoch, Purpose.WHETHER_TO_INFILL), document)[0], self.rate):
            return None
        if source.spans(document) is not None:
            counts["spanned"] += 1
            return None
        text = self._text(source.document(document))
        if text is None:
            counts["irreversible"] += 1
            return None
        words = _words(key, epoch, document)
        changed, suffix_first = infill(text, words, self._tokenizer, self._suffix_first_rate)
        if len(changed) > room:
            counts["unfitting"] += 1
            return None
        counts["infilled"] += 1
        return np.array(changed, np.int64), "SPM" if suffix_first else "PSM"

    def cuts(self, source: Source, document: int, key: int, epoch: int) -> tuple[int, int]:
        """Where an infilling document is cut: the characters of its text that its middle begins with and ends before.

        Arguments as of `infilled`.
        """
        text = self._tokenizer.decode(source.document(document).tolist()[1:-1])
        return _cuts(text, _words(key, epoch, document))

    def _text(self, ids: IntArray) -> str | None:
        """The text of a document, if there is some and the document is what this tokenizer makes of it."""
        tokenizer, body = self._tokenizer, ids[1:-1]
        if len(body) == 0 or (int(ids[0]), int(ids[-1])) != (tokenizer.bos, tokenizer.eos):
            return None
        if not 0 <= int(body.min()) <= int(body.max()) < tokenizer.vocabulary:
            return None  # where the sample is made, that is an error
        text = tokenizer.decode(body.tolist())
        return text if np.array_equal(tokenizer.encode_array(text), body) else None


def infill(text: str, words: Sequence[int], tokenizer: Tokenizer, suffix_first_rate: float) -> tuple[list[int], bool]:
    """Turn a document into an infilling document.

    Two cut points are uniform over the text's characters, ends included; any part may be empty.

    Args:
        text: The document's text.
        words: Three random words: of the cuts and of the order.
        tokenizer: One with infilling pieces.
        suffix_first_rate: Share of documents in SPM order.

    Returns:
        The ids, BOS and EOS included, and whether they are in SPM order.
    """
    start, stop = _cuts(text, words)
    suffix_first = chance(words[2], suffix_first_rate)
    ids = infilling_document(text[:start], text[start:stop], text[stop:], tokenizer, suffix_first=suffix_first)
    return ids, suffix_first


def _words(key: int, epoch: int, document: int) -> list[int]:
    return draw(key_of(key, epoch, Purpose.WHERE_TO_CUT), document, 3)


def _cuts(text: str, words: Sequence[int]) -> tuple[int, int]:
    start, stop = sorted(below(word, len(text) + 1) for word in words[:2])
    return start, stop


def infilling_document(
    prefix: str, middle: str, suffix: str, tokenizer: Tokenizer, *, suffix_first: bool = False
) -> list[int]:
    """Ids of the infilling document of three parts, BOS and EOS included.

    Raises:
        UserError: the tokenizer has no infilling pieces.
    """
    pre, suf, mid, eot = _pieces(tokenizer)
    tail = [suf, *tokenizer.encode_continuation(suffix), mid]
    if suffix_first:
        body = [*tail, *tokenizer.encode(prefix + middle)]
    else:
        body = [*tokenizer.encode(prefix), *tail, *tokenizer.encode_continuation(middle)]
    return [tokenizer.bos, pre, *body, eot, tokenizer.eos]


def infilling_prompt(prefix: str, suffix: str, tokenizer: Tokenizer, suffix_first: bool = False) -> list[int]:
    """Ids after which a model writes the middle, until it writes EOT (`Tokenizer.eot_id`).

    In SPM order the prefix must end where a token does; inside a token PSM is the order to use (Code Llama App. E).

    Raises:
        UserError: the tokenizer has no infilling pieces.
    """
    pre, suf, mid, _ = _pieces(tokenizer)
    tail = [suf, *tokenizer.encode_continuation(suffix), mid]
    start = tokenizer.encode(prefix)
    return [tokenizer.bos, pre, *tail, *start] if suffix_first else [tokenizer.bos, pre, *start, *tail]


def _pieces(tokenizer: Tokenizer) -> tuple[int, int, int, int]:
    pre, suf, mid, eot = tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id
    if pre is None or suf is None or mid is None or eot is None:
        raise UserError(f"the tokenizer {tokenizer.path} has no infilling pieces; use one that has, or no infilling")
    return pre, suf, mid, eot
