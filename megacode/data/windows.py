"""Which stretch of a source sample n is: a function of n, with no shuffled index in memory.

Each epoch cuts the source, all documents laid end to end, into windows of sequence_length + 1 tokens that overlap by
one (so that each token is predicted once), from an offset that differs between epochs; and takes them in an order that
is a pseudo-random permutation, computed for one number at a time.
"""

from dataclasses import dataclass
from functools import lru_cache

from megacode.data.counter import NUM_ROUNDS, Purpose, below, draw, key_of, permute


@dataclass(frozen=True)
class Windows:
    """The windows of a source.

    Args:
        num_tokens: Length of the source; at least sequence_length + 1.
        sequence_length: Tokens that a window predicts.
        key: Of offsets and orders.
    """

    num_tokens: int
    sequence_length: int
    key: int

    @property
    def per_epoch(self) -> int:
        """Windows of an epoch, the same for all: as many as fit behind the largest offset, and at least one."""
        return max(1, self.num_tokens // self.sequence_length - 1)

    def locate(self, sample: int) -> tuple[int, int]:
        """The epoch of a sample and where its window starts in the source; it has sequence_length + 1 tokens."""
        epoch, index = divmod(sample, self.per_epoch)
        offset_word, order = _epoch(self.key, epoch)
        room = self.num_tokens - 1 - self.per_epoch * self.sequence_length
        offset = below(offset_word, min(self.sequence_length, room + 1))
        return epoch, offset + permute(index, self.per_epoch, order) * self.sequence_length


@lru_cache(maxsize=64)
def _epoch(key: int, epoch: int) -> tuple[int, list[int]]:
    offset = draw(key_of(key, epoch, Purpose.OFFSET), 0)[0]
    return offset, draw(key_of(key, epoch, Purpose.PERMUTATION), 0, NUM_ROUNDS)
