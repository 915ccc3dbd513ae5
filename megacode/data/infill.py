"""Infilling documents: cut a text at two characters and move its middle to the end (Code Llama 2.3, FIM App. D).

With enc = `Tokenizer.encode` and enc0 = `Tokenizer.encode_continuation` (no dummy prefix) the two orders are

    PSM   BOS PRE enc(prefix) SUF enc0(suffix) MID enc0(middle) EOT EOS
    SPM   BOS PRE SUF enc0(suffix) MID enc(prefix + middle) EOT EOS

SPM is the paper's "compatible" variant: it is what PSM becomes with an empty prefix. Prefix and middle are encoded as
one text there, so no token is split at their joint. That a training document ends in EOS after EOT is a choice of ours:
the authors say that training documents have BOS and EOS, but not whether those of infilling do.
"""

from megacode.data.counter import Purpose, below, chance, draw
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError


def infill(
    text: str, *, seed: int, epoch: int, document: int, tokenizer: Tokenizer, suffix_first_rate: float
) -> list[int]:
    """Turn a document into an infilling document.

    Two cut points are uniform over the text's characters, ends included; any part may be empty. Cuts and order are a
    function of (seed, epoch, document) alone.

    Args:
        text: The document's text.
        seed, epoch, document: What the randomness is keyed by.
        tokenizer: One with infilling pieces.
        suffix_first_rate: Share of documents in SPM order.

    Returns:
        The ids, BOS and EOS included.
    """
    first, second, order = draw(seed, epoch, Purpose.WHERE_TO_CUT, document, 3)
    start, stop = sorted((below(first, len(text) + 1), below(second, len(text) + 1)))
    return infilling_document(
        text[:start], text[start:stop], text[stop:], tokenizer, suffix_first=chance(order, suffix_first_rate)
    )


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
