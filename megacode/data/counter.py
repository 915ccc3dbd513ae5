"""Counter-based randomness: a number is a pure function of what it is for, never the next of a stream.

So a sample depends on nothing but its number: not on how many workers or ranks there are, nor on what was drawn before.

A key is mixed from what the numbers are for; the numbers of a key are the outputs of SplitMix64 (Steele et al. 2014)
started at the key, of which any one can be computed by itself. Integers of Python and arrays of numpy give the same.
"""

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WORD = 1 << 64
_MASK = _WORD - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Purpose(IntEnum):
    """What a number is drawn for; numbers of different purposes are independent."""

    OFFSET = 0
    PERMUTATION = 1
    WHETHER_TO_INFILL = 2
    WHERE_TO_CUT = 3
    BLOCKS = 4
    NEIGHBOURS = 5


@lru_cache(maxsize=1 << 14)
def key_of(*words: int) -> int:
    """A key, a function of the integers and of their order; those that agree modulo 2**64 are the same."""
    key = len(words)
    for word in words:
        key = mix((key + _GOLDEN & _MASK) ^ mix(word & _MASK))
    return key


def draw(key: int, index: int, num_words: int = 1) -> list[int]:
    """Uniform 64-bit words, a function of the arguments alone; `num_words` must be the same in all draws of a key.

    Args:
        key: From `key_of`.
        index: Which of the things of this key, such as a document's number.
        num_words: How many to return.
    """
    first = index * num_words
    return [mix(key + (first + i + 1) * _GOLDEN & _MASK) for i in range(num_words)]


def draw_array(key: int, indices: NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    """`draw(key, index, 1)` of many indices."""
    word = (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(key)
    word = (word ^ word >> np.uint64(30)) * np.uint64(_FIRST)
    word = (word ^ word >> np.uint64(27)) * np.uint64(_SECOND)
    return word ^ word >> np.uint64(31)


def below(word: int, bound: int) -> int:
    """Turn a word into an integer of 0..bound-1 (the bias is under bound / 2**64)."""
    return word * bound >> 64


def chance(word: int, probability: float) -> bool:
    """Turn a word into an event of the given probability; 0 never and 1 always happens."""
    return word < probability * _WORD


def mix(word: int) -> int:
    """Finaliser of SplitMix64: a bijection of 64-bit words; each bit of the result depends on each bit of the word."""
    word = (word ^ word >> 30) * _FIRST & _MASK
    word = (word ^ word >> 27) * _SECOND & _MASK
    return word ^ word >> 31


NUM_ROUNDS = 8


def permute(index: int, size: int, keys: Sequence[int]) -> int:
    """Where a keyed pseudo-random permutation of 0..size-1 sends index.

    A Feistel network over the next power of four; what falls outside goes round again (cycle walking), fewer than four
    times on average (Black and Rogaway 2002).

    Args:
        keys: One word a round, NUM_ROUNDS of them.
    """
    assert 0 <= index < size
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        index = left << half | right
        if index < size:
            return index
