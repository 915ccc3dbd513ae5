"""Curves of a run of any length in little memory: values by step, put together in bins as they come."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megacode.tools.drawing import Point

Key = tuple[str, ...]
"""Name of a value: ("loss",) or ("loss_by_source", "python")."""
MOST_BINS = 1000


@dataclass(slots=True)
class Bin:
    """What is known of one value over the steps of a bin."""

    count: int
    total: float
    low: float
    high: float

    def add(self, value: float) -> None:
        """Take in a step's value."""
        self.count += 1
        self.total += value
        if value < self.low:
            self.low = value
        elif value > self.high:
            self.high = value

    def merge(self, other: "Bin") -> None:
        """Take in the values of another bin."""
        self.count += other.count
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


class Curves:
    """Values by step. With more than `most` bins, each two neighbours become one.

    Attributes:
        width: steps of a bin.
    """

    def __init__(self, most: int = MOST_BINS) -> None:
        self.most, self.width = most, 1
        self._origin: int | None = None
        self._steps: dict[int, tuple[int, int]] = {}
        self._bins: dict[Key, dict[int, Bin]] = {}

    def add(self, step: int, values: Mapping[Key, float | None]) -> None:
        """One step's values; None is one that is not known."""
        if self._origin is None:
            self._origin = step
        index = (step - self._origin) // self.width
        first, last = self._steps.get(index, (step, step))
        self._steps[index] = min(first, step), max(last, step)
        for key, value in values.items():
            if value is None:
                continue
            bins = self._bins.setdefault(key, {})
            if index in bins:
                bins[index].add(value)
            else:
                bins[index] = Bin(1, value, value, value)
        if len(self._steps) > self.most:
            self._halve()

    @property
    def keys(self) -> list[Key]:
        """Names of the values that were known at least once, in the order of coming."""
        return list(self._bins)

    def points(self, key: Key) -> list[Point | None]:
        """A value's curve: a point a bin, in the middle of its steps; None where no step of the bin knows it."""
        bins = self._bins.get(key, {})
        points: list[Point | None] = []
        for index, (first, last) in sorted(self._steps.items()):
            if (found := bins.get(index)) is None:
                points.append(None)
            else:
                points.append(Point((first + last) / 2, found.total / found.count, found.low, found.high))
        return points

    def stacks(self, keys: Sequence[Key], most: int) -> list[tuple[float, list[float]]]:
        """(first step, mean of each value) of at most `most` groups of neighbouring bins; unknown values are zero."""
        indices = sorted(index for index in self._steps if any(index in self._bins.get(key, {}) for key in keys))
        size = max(1, -(-len(indices) // most))
        groups = []
        for start in range(0, len(indices), size):
            group = indices[start : start + size]
            found = [[self._bins[key][i] for i in group if i in self._bins.get(key, {})] for key in keys]
            means = [sum(b.total for b in bins) / max(1, sum(b.count for b in bins)) for bins in found]
            groups.append((float(self._steps[group[0]][0]), means))
        return groups

    def mean(self, key: Key) -> float | None:
        """Over all steps that know the value."""
        bins = self._bins.get(key, {}).values()
        count = sum(b.count for b in bins)
        return sum(b.total for b in bins) / count if count else None

    def _halve(self) -> None:
        self.width *= 2
        steps: dict[int, tuple[int, int]] = {}
        for index, (first, last) in self._steps.items():
            other_first, other_last = steps.get(index // 2, (first, last))
            steps[index // 2] = min(first, other_first), max(last, other_last)
        self._steps = steps
        for key, old in self._bins.items():
            merged: dict[int, Bin] = {}
            for index, found in old.items():
                if index // 2 in merged:
                    merged[index // 2].merge(found)
                else:
                    merged[index // 2] = found
            self._bins[key] = merged
