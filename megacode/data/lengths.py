"""How long the documents of a shard are, read in blocks, and what that means for sequences and infilling."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megacode.data.shards import Shards
from megacode.errors import UserError

_BLOCK = 1 << 20
NUM_CLASSES = 32


@dataclass(frozen=True)
class Amount:
    """So much of a shard; expected values need not be whole."""

    documents: float = 0
    tokens: float = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.documents + other.documents, self.tokens + other.tokens)


@dataclass(frozen=True)
class Lengths:
    """What the lengths of a shard's documents say, against a sample of sequence_length + 1 tokens."""

    shortest: int
    longest: int
    documents: NDArray[np.int64]  # [NUM_CLASSES]: class 0 is of empty ones, class c of 2**(c-1) to 2**c - 1 tokens
    tokens: NDArray[np.int64]  # [NUM_CLASSES]: theirs
    too_long: Amount
    """Documents that no sample holds."""
    uncut: dict[str, Amount]
    """Packing -> what is expected to lie whole in its sample, and so may become infilling documents."""


def measure(shards: Shards, sequence_length: int) -> Lengths:
    """Read the lengths of all documents.

    Best-fit packing cuts no document that a sample holds. Where documents are laid end to end, samples begin every
    sequence_length tokens, from anywhere: a document of n tokens is uncut in min(L, L + 2 - n) of L cases. (Infilling
    documents before it that grow cut a little more.)

    Raises:
        UserError: the index is damaged.
    """
    documents, tokens = np.zeros(NUM_CLASSES, np.int64), np.zeros(NUM_CLASSES, np.int64)
    shortest, longest = shards.num_tokens, 0
    too_long, uncut = Amount(), {"concatenate": Amount(), "best_fit": Amount()}
    for lengths in _blocks(shards):
        classes = np.frexp(lengths.astype(np.float64))[1]
        documents += np.bincount(classes, minlength=NUM_CLASSES)
        tokens += np.bincount(classes, lengths, NUM_CLASSES).astype(np.int64)  # sums below 2**53 are exact
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
        fits = lengths <= sequence_length + 1
        too_long += _amount(~fits, lengths)
        uncut["best_fit"] += _amount(fits, lengths)
        uncut["concatenate"] += _amount(np.clip((sequence_length + 2 - lengths) / sequence_length, 0, 1), lengths)
    return Lengths(shortest, longest, documents, tokens, too_long, uncut)


def _amount(share: NDArray[np.bool_ | np.float64], lengths: NDArray[np.int64]) -> Amount:
    """So much of each document that is not empty."""
    return Amount(float(share[lengths > 0].sum()), float((share * lengths).sum()))


def _blocks(shards: Shards) -> Iterator[NDArray[np.int64]]:
    for start in range(0, shards.num_documents, _BLOCK):
        lengths = shards.lengths[start : start + _BLOCK].astype(np.int64)
        if int(lengths.min()) < 0:
            raise UserError(f"{shards.prefix}.idx is damaged: a negative length; prepare the shard again")
        yield lengths
