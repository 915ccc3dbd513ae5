"""megacode.data.best_fit: against packing one item after the other, and nothing lost."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacode.data.best_fit import count_bins, pack, stable_argsort


def one_by_one(sizes, capacity):
    """Best-fit decreasing as its definition says it: the room that is left in each bin."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [bin_ for bin_, room in enumerate(rooms) if room >= size]
        if fitting:
            best = min(fitting, key=lambda bin_: rooms[bin_])
        else:
            best = len(rooms)
            rooms.append(capacity)
        rooms[best] -= size
    return rooms


@given(st.integers(1, 60), st.data())
def test_it_is_best_fit_decreasing(capacity, data):
    sizes = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=80)), np.int32)
    order = np.array(data.draw(st.permutations(range(len(sizes)))), np.int64)
    items, starts = pack(sizes, capacity, order)
    rooms = one_by_one(sizes.tolist(), capacity)
    bins = [items[a:b].tolist() for a, b in pairwise(starts)]
    assert sorted(items.tolist()) == list(range(len(sizes)))
    assert sorted(capacity - int(sizes[bin_].sum()) for bin_ in bins) == sorted(rooms)
    assert all(bin_ for bin_ in bins)
    assert count_bins(sizes, capacity) == len(rooms)
    place = np.argsort(order)
    assert all(np.diff(place[bin_]).min(initial=1) > 0 for bin_ in bins), "in a bin, items stand in the order given"


@pytest.mark.parametrize("capacity", [4097, 70_000])
def test_on_many_lengths_like_those_of_code(capacity):
    generator = np.random.default_rng(0)
    sizes = np.clip(generator.lognormal(6.2, 1.2, 3000), 1, capacity).astype(np.int32)
    rooms = one_by_one(sizes.tolist(), capacity)
    items, starts = pack(sizes, capacity, generator.permutation(3000))
    assert sorted(capacity - np.add.reduceat(sizes[items], starts[:-1])) == sorted(rooms)


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_stable_argsort(values):
    array = np.array(values, np.uint64)
    assert stable_argsort(array).tolist() == np.argsort(array, kind="stable").tolist()
