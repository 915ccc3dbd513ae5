"""Which data rank keeps what of a checkpoint, and in which order it is copied."""

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest

from megacode.engine.gather import Gatherer, _rounds

LAYER = [4096 * 4096] * 4 + [4096 * 11008] * 3 + [4096] * 2
SIZES = [32016 * 4096, *LAYER * 8, 4096, 32016 * 4096]
"""Of a 7B's shape, with eight layers."""


def gatherer(spans):
    """Of a rank that knows where everybody's shares are: name -> (start, stop) of each data rank."""
    ranks = len(next(iter(spans.values())))
    with mock.patch("torch.distributed.get_process_group_ranks", return_value=list(range(ranks))):
        found = Gatherer(dict.fromkeys(spans), SimpleNamespace(zero_size=ranks, data_group=None), None)
    found._spans = spans
    return found


def zero_3(ranks):
    """Each parameter is spread evenly, the last rank has what is left."""
    shares = {str(number): (size, -(-size // ranks)) for number, size in enumerate(SIZES)}
    return {
        name: [(min(rank * share, size), min((rank + 1) * share, size)) for rank in range(ranks)]
        for name, (size, share) in shares.items()
    }


def zero_1(ranks):
    """All parameters lie one behind the other, of which each rank has a stretch."""
    spans, share, begin = {}, -(-sum(SIZES) // ranks), 0
    for number, size in enumerate(SIZES):
        bounds = [min(max(rank * share - begin, 0), size) for rank in range(ranks + 1)]
        spans[str(number)] = list(itertools.pairwise(bounds))
        begin += size
    return spans


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("spread", [zero_1, zero_3])
def test_all_keep_as_much_and_copy_at_the_same_time(spread, ranks):
    spans = spread(ranks)
    keepers = gatherer(spans).keepers()
    assert keepers.keys() == spans.keys()
    kept = [sum(SIZES[int(name)] for name, keeper in keepers.items() if keeper == rank) for rank in range(ranks)]
    assert max(kept) < 1.12 * sum(SIZES) / ranks
    rounds = list(_rounds([(name, "weight", keeper, None) for name, keeper in keepers.items()], ranks))
    assert len(rounds) < 1.5 * len(SIZES) / ranks + 2
    if spread is zero_1:  # but for those that lie on two ranks, nothing is sent
        sent = sum(
            SIZES[int(name)] - spans[name][keeper][1] + spans[name][keeper][0] for name, keeper in keepers.items()
        )
        assert sent <= (ranks - 1) * max(SIZES) / 2
