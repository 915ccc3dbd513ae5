"""Which source sample n is from, and which of that source's samples it is: a function of n, with no stored indices.

Samples come in blocks of 10,000. In each block a source has its share, rounded up or down, so that any block is off by
less than one sample; who is rounded up goes round over a period of 987 blocks, at whose end all shares are exact.
Within a block, a source's places are a stretch of 0..9,999, and sample n stands at place n * MULTIPLIER mod 10,000:
with a multiplier near the golden section of 10,000 any run of samples is spread evenly (Weyl's sequence), so that an
optimizer step has nearly its share of each source.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError

BLOCK = 10_000
PERIOD = 987
_MULTIPLIER = 6181  # next to 10,000 / 1.618..., and without a factor in common with 10,000
_ROUNDING = 610  # 987 and 610 are Fibonacci numbers: no other multiplier spreads more evenly


class Mixture:
    """Blends sources by weights.

    Args:
        names: of the sources, for errors.
        weights: positive numbers; only their ratios matter.

    Attributes:
        weights: shares of the sources, summing to 1: what was asked for, to within 1e-7.

    Raises:
        UserError: a source has less than one sample in 10 million.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float]) -> None:
        units = BLOCK * PERIOD
        ends = np.rint(np.cumsum(weights) / np.sum(weights) * units).astype(np.int64)
        shares = np.diff(ends, prepend=0)  # [sources]; samples in a period
        for name, share in zip(names, shares, strict=True):
            if share == 0:
                raise UserError(
                    f"data.train: the weight of {name} is less than 1 in {units:,} of all; raise it or drop the source"
                )
        self.weights = tuple((shares / units).tolist())
        self._shares = shares
        # Systematic rounding: of fractions in PERIOD-ths with cumulative sums s, block b gives source k one sample more
        # where a multiple of PERIOD lies between s[k-1] + u and s[k] + u; u takes each value 0..PERIOD-1 once.
        fractions = np.concatenate([[0], np.cumsum(shares % PERIOD)])
        shifts = np.arange(PERIOD) * _ROUNDING % PERIOD  # [blocks]
        ups = (fractions[None, :] + shifts[:, None]) // PERIOD  # [blocks, sources + 1]
        self._starts = ups + np.concatenate([[0], np.cumsum(shares // PERIOD)])  # [blocks, sources + 1]
        self._before = np.zeros((PERIOD + 1, len(shares)), np.int64)  # [blocks + 1, sources]; samples of earlier blocks
        np.cumsum(np.diff(self._starts, axis=1), axis=0, out=self._before[1:])
        self._blocks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}  # the last two that were asked for

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and how many samples before it are of that source."""
        if len(self.weights) == 1:
            return 0, sample
        block, slot = divmod(sample, BLOCK)
        period, block = divmod(block, PERIOD)
        sources, ranks = self._slots(block)
        source = int(sources[slot])
        return source, period * int(self._shares[source]) + int(self._before[block, source]) + int(ranks[slot])

    def _slots(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each sample of a block the source, and how many in the block before it are of that: [BLOCK], [BLOCK]."""
        if block not in self._blocks:
            places = np.arange(BLOCK) * _MULTIPLIER % BLOCK
            sources = np.searchsorted(self._starts[block], places, "right") - 1
            starts = self._starts[block]
            ranks = np.empty(BLOCK, np.int64)
            ranks[np.argsort(sources, kind="stable")] = np.arange(BLOCK) - np.repeat(starts[:-1], np.diff(starts))
            self._blocks = {**dict([*self._blocks.items()][-1:]), block: (sources, ranks)}
        return self._blocks[block]

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first samples are of each source."""
        if len(self.weights) == 1:
            return [num_samples]
        block, rest = divmod(num_samples, BLOCK)
        period, block = divmod(block, PERIOD)
        partial: NDArray[np.int64] = np.bincount(self._slots(block)[0][:rest], minlength=len(self.weights))
        return [int(n) for n in period * self._shares + self._before[block] + partial]
