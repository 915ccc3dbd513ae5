"""megacode.data.counter: that draws are the generator they claim to be, uniform, and independent of each other."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacode.data.counter import NUM_ROUNDS, below, chance, draw, draw_array, key_of, permute


def test_splitmix64():
    """The first outputs for seed 1234567, from the generator's reference implementation (Vigna)."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [draw(1234567, i)[0] for i in range(5)] == known
    assert draw(1234567, 0, 5) == known


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**48), min_size=1))
def test_arrays_are_the_same(key, indices):
    assert draw_array(key, np.array(indices)).tolist() == [draw(key, index)[0] for index in indices]


def test_keys_differ_by_every_word_and_their_order():
    words = list(product(range(6), repeat=4)) + list(product(range(6), repeat=3))
    assert len({key_of(*each) for each in words}) == len(words)
    assert key_of(1, 2) == key_of(1 + 2**64, 2) != key_of(2, 1)


def bits(words):
    return (np.array(words, np.uint64)[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).astype(float)


@pytest.mark.parametrize("neighbour", ["index", "seed", "epoch", "source", "purpose"])
def test_neighbouring_draws_are_independent(neighbour):
    """Of draws that differ by one in one thing no bit tells anything about a bit of the other."""
    here, there = [], []
    for i in range(20_000):
        words = {"seed": i % 7, "source": i % 5, "epoch": i % 11, "purpose": i % 3, "index": i}
        here.append(draw(key_of(*list(words.values())[:4]), words["index"])[0])
        words[neighbour] += 1
        there.append(draw(key_of(*list(words.values())[:4]), words["index"])[0])
    one, other = bits(here) - 0.5, bits(there) - 0.5
    correlation = np.abs(one.T @ other) / len(here) * 4  # [64, 64]; standard deviation 1 / sqrt(20,000) = 0.0071
    assert correlation.max() < 0.0071 * 5.2, "of 4,096 values, 5.2 deviations have probability 0.1 %"
    assert np.abs(one.mean(0)).max() * 2 < 0.0071 * 4.5


@pytest.mark.parametrize("count", [2, 10, 97])
def test_below_is_uniform(count):
    num = 50_000
    found = np.bincount([below(draw(5, i)[0], count) for i in range(num)], minlength=count)
    chi2 = ((found - num / count) ** 2 / (num / count)).sum()
    assert chi2 < count + 3.3 * (2 * count) ** 0.5 + 8


def test_chance():
    words = [draw(3, i)[0] for i in range(20_000)]
    assert not any(chance(word, 0) for word in words)
    assert all(chance(word, 1) for word in [*words, 2**64 - 1])
    assert abs(np.mean([chance(word, 0.9) for word in words]) - 0.9) < 0.0085, "four standard deviations"


@given(st.integers(1, 400), st.integers(0, 3))
def test_permute_is_a_permutation(size, epoch):
    keys = draw(key_of(0, epoch), 0, NUM_ROUNDS)
    assert sorted(permute(i, size, keys) for i in range(size)) == list(range(size))


def test_permute_is_uniform_enough():
    size, num_keys = 50, 2000
    found = np.zeros((size, size))
    followers = 0
    for epoch in range(num_keys):
        keys = draw(key_of(3, epoch), 0, NUM_ROUNDS)
        order = [permute(i, size, keys) for i in range(size)]
        found[range(size), order] += 1
        followers += sum(b == a + 1 for a, b in pairwise(order))
    expected = num_keys / size
    chi2 = ((found - expected) ** 2 / expected).sum()
    assert chi2 < 2620, "(50-1)^2 = 2401 degrees of freedom, standard deviation 69: above 2620 has probability 0.1 %"
    # Neighbours that stay neighbours: (size - 1)/size a permutation, variance about 1.
    assert abs(followers / num_keys - (size - 1) / size) < 3.3 / num_keys**0.5
