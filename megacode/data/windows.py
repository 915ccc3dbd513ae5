"""Which stretch of the corpus sample n is: a function of n, with no shuffled index in memory.

Each epoch cuts the corpus, all documents laid end to end, into windows of sequence_length + 1 tokens that overlap by
one (so that each token is predicted once), from an offset that differs between epochs; and takes them in an order that
is a pseudo-random permutation, computed for one number at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megacode.data.counter import Purpose, below, draw

_ROUNDS = 8
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Windows:
    """The windows of a corpus.

    Args:
        num_tokens: Length of the corpus; at least sequence_length + 1.
        sequence_length: Tokens that a window predicts.
        seed: Key of offsets and orders.
    """

    num_tokens: int
    sequence_length: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Windows of an epoch, the same for all: as many as fit behind the largest offset, and at least one."""
        return max(1, self.num_tokens // self.sequence_length - 1)

    def locate(self, sample: int) -> tuple[int, int]:
        """The epoch of a sample and where its window starts in the corpus; it has sequence_length + 1 tokens."""
        epoch, index = divmod(sample, self.per_epoch)
        room = self.num_tokens - 1 - self.per_epoch * self.sequence_length
        offsets = min(self.sequence_length, room + 1)
        offset = below(draw(self.seed, epoch, Purpose.OFFSET, 0, 1)[0], offsets)
        keys = draw(self.seed, epoch, Purpose.PERMUTATION, 0, _ROUNDS)
        return epoch, offset + permute(index, self.per_epoch, keys) * self.sequence_length


def permute(index: int, size: int, keys: Sequence[int]) -> int:
    """Where a keyed pseudo-random permutation of 0..size-1 sends index.

    A Feistel network over the next power of four; what falls outside goes round again (cycle walking), fewer than four
    times on average (Black and Rogaway 2002).
    """
    assert 0 <= index < size
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(word: int) -> int:
    """Finaliser of SplitMix64 (Steele et al. 2014): every bit of the result depends on every bit of the word."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _MASK
    return word ^ word >> 31
