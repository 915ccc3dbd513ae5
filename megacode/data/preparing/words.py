"""Words of code as numbers: what near-duplicate removal and decontamination compare.

A word is a run of letters, digits and underscores, ASCII letters in lower case; what is not ASCII counts as a letter.
White space and punctuation only part words, so a file that was formatted anew keeps its words. Numbers stay as they
are, since two problems may differ in nothing else. Nearly BigCode's words, which keep the case and ASCII alone
(bigcode-dataset, near_deduplication).
"""

import string
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray

_PIECE = 1 << 20  # bytes that are cut into words at once
_MOST_KNOWN = 1 << 20  # words whose hashes are kept
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_LETTERS = (string.ascii_letters + string.digits + "_").encode()
_TABLE = bytes(byte if byte in _LETTERS or byte > 127 else 32 for byte in range(256)).lower()

Hashes = NDArray[np.uint64]


class _Known(dict[bytes, int]):
    """Word -> its hash. Code repeats its words, so most are looked up."""

    def __missing__(self, word: bytes) -> int:
        if len(self) >= _MOST_KNOWN:
            self.clear()
        value = self[word] = xxhash.xxh64_intdigest(word)
        return value


_known = _Known()


def split(text: str) -> list[str]:
    """The words of a text."""
    return [word.decode("utf-8", "replace") for word in text.encode().translate(_TABLE).split()]


@lru_cache(maxsize=1)  # signature and decontamination ask for the same document one after the other
def word_hashes(text: str) -> Hashes:
    """64-bit xxHash of each word of a text. Returns: [words]."""
    data = text.encode().translate(_TABLE)
    parts, start = [], 0
    while start < len(data):
        stop = data.find(b" ", start + _PIECE)
        words = data[start : stop if stop >= 0 else len(data)].split()
        parts.append(np.fromiter(map(_known.__getitem__, words), dtype=np.uint64, count=len(words)))
        start = stop if stop >= 0 else len(data)
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def ngram_hashes(words: Hashes, n: int) -> Hashes:
    """64-bit hashes of all runs of n words. Returns: [words - n + 1], nothing where there are fewer than n words."""
    count = max(len(words) - n + 1, 0)
    result = np.zeros(count, np.uint64)
    for i in range(n):
        result = (result ^ (result >> np.uint64(29))) * _FACTOR + words[i : i + count]
    return result ^ (result >> np.uint64(32))
