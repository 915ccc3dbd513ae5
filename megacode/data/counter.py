"""Counter-based randomness: a number is a pure function of what it is for, never the next of a stream.

So a sample depends on nothing but its number: not on how many workers or ranks there are, nor on what was drawn before.
"""

from enum import IntEnum

import numpy as np

_WORD = 1 << 64


class Purpose(IntEnum):
    """What a number is drawn for; numbers of different purposes are independent."""

    OFFSET = 0
    PERMUTATION = 1
    WHETHER_TO_INFILL = 2
    WHERE_TO_CUT = 3


def draw(seed: int, epoch: int, purpose: Purpose, index: int, num_words: int) -> list[int]:
    """Uniform 64-bit words, a function of the arguments alone (Philox4x64, Salmon et al. 2011).

    Args:
        seed: Any non-negative integer; seeds that agree modulo 2**64 are the same.
        epoch: Which pass over the corpus.
        purpose: What for.
        index: Which of the things of this purpose, such as a document's number.
        num_words: How many to return.
    """
    # The lowest word of the counter advances within one draw; the others keep the draws apart.
    counter = np.array([0, index, int(purpose), 0], np.uint64)
    key = np.array([seed % _WORD, epoch], np.uint64)
    return [int(word) for word in np.random.Philox(counter=counter, key=key).random_raw(num_words)]


def below(word: int, bound: int) -> int:
    """Turn a word into an integer of 0..bound-1 (the bias is under bound / 2**64)."""
    return word * bound >> 64


def chance(word: int, probability: float) -> bool:
    """Turn a word into an event of the given probability; 0 never and 1 always happens."""
    return word < probability * _WORD
