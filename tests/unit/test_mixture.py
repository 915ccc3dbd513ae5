"""megacode.data.mixture: proportions, that nothing comes twice, and that steps are blended too."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.data.mixture import BLOCK, PERIOD, Mixture
from megacode.errors import UserError

CODE = (85, 8, 7)  # Code Llama, Table 1
PYTHON = (75, 10, 10, 5)
UNEVEN = (0.31415926, 0.27182818, 0.4)
TINY = (0.0001, 0.9, 0.0999)


def make(weights):
    return Mixture([str(i) for i in range(len(weights))], weights)


def locate(mixture, first, count):
    found = np.array([mixture.locate(n) for n in range(first, first + count)])
    return found[:, 0], found[:, 1]


@pytest.mark.parametrize("weights", [CODE, PYTHON, UNEVEN, TINY, (1, 1), (1e-6, 1)])
@pytest.mark.parametrize("block", [0, 1, 77, PERIOD - 1, PERIOD, 10**6])
def test_any_block_has_its_proportions(weights, block):
    sources, _ = locate(make(weights), block * BLOCK, BLOCK)
    shares = np.array(weights) / sum(weights)
    assert np.abs(np.bincount(sources, minlength=len(weights)) / BLOCK - shares).max() < 1.001e-4


@pytest.mark.parametrize("weights", [CODE, PYTHON])
def test_table_1_is_exact(weights):
    for first in (0, 123, 5 * BLOCK + 4567):
        sources, _ = locate(make(weights), first, BLOCK)
        assert (np.bincount(sources) * 100 == np.array(weights) * BLOCK).all(), (
            "in any 10,000 samples, whole block or not"
        )


@pytest.mark.parametrize("weights", [CODE, UNEVEN, TINY])
def test_any_run_of_10000_is_within_three(weights):
    mixture = make(weights)
    sources, _ = locate(mixture, 3 * BLOCK, 4 * BLOCK)
    for source, share in enumerate(mixture.weights):
        counts = np.concatenate([[0], np.cumsum(sources == source)])
        assert np.abs(counts[BLOCK:] - counts[:-BLOCK] - share * BLOCK).max() < 3


@pytest.mark.parametrize("weights", [CODE, PYTHON, UNEVEN])
@pytest.mark.parametrize("step", [32, 100, 1000])
def test_steps_are_blended(weights, step):
    mixture = make(weights)
    sources, _ = locate(mixture, 0, 2 * BLOCK)
    for source, share in enumerate(mixture.weights):
        counts = np.add.reduceat(sources == source, np.arange(0, 2 * BLOCK - step, step), dtype=int)[:-1]
        assert np.abs(counts - share * step).max() < 3.5
        spread = (share * (1 - share) * step) ** 0.5
        assert counts.std() < max(0.7 * spread, 1), "far from random draws"


@settings(max_examples=20)
@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=8), st.integers(0, 3 * PERIOD))
def test_every_sample_of_a_source_comes_once_and_in_order(weights, block):
    mixture = make(weights)
    sources, numbers = locate(mixture, block * BLOCK, BLOCK)
    before, after = mixture.counts(block * BLOCK), mixture.counts((block + 1) * BLOCK)
    assert sum(before) == block * BLOCK
    for source, (low, high) in enumerate(zip(before, after, strict=True)):
        assert numbers[sources == source].tolist() == list(range(low, high))


@given(st.integers(0, 30_000))
def test_counts(num_samples):
    mixture = make(UNEVEN)
    sources, _ = COUNTED
    assert mixture.counts(num_samples) == np.bincount(sources[:num_samples], minlength=3).tolist()


COUNTED = locate(make(UNEVEN), 0, 30_000)


@pytest.mark.parametrize("weights", [UNEVEN, TINY, (1e-6, 1)])
def test_a_period_is_exact(weights):
    mixture = make(weights)
    counts = mixture.counts(PERIOD * BLOCK)
    assert np.allclose(counts, np.array(weights) / sum(weights) * PERIOD * BLOCK, atol=1)
    assert counts == [round(share * PERIOD * BLOCK) for share in mixture.weights]
    for block in range(PERIOD):
        errors = np.array(mixture.counts(block * BLOCK)) - np.array(mixture.weights) * block * BLOCK
        assert np.abs(errors).max() < 4, "nor do the errors add up on the way"


def test_one_source():
    mixture = make((7,))
    assert (mixture.weights, mixture.locate(12345678), mixture.counts(99)) == ((1.0,), (0, 12345678), [99])


def test_a_weight_too_small():
    with pytest.raises(UserError, match="the weight of 1 is less than 1 in 9,870,000 of all"):
        make((1, 1e-9))
