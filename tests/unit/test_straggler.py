"""Which rank makes the others wait, and when it is said."""

import pytest

from megacode.parallel.heartbeat import AXES, PARTS, Record
from megacode.plan.layout import Layout
from megacode.train.straggler import RATIO, WINDOW_STEPS, Stragglers, slowest
from megacode.train.verdict import Seen

LAYOUT = Layout(2, 4, 1, 1, 1, (range(1), range(1)))
"""Two stages of four ranks."""
USUAL = {"data": 0.01, "forward": 0.3, "backward": 0.6, "communication": 0.1, "optimizer": 0.05, "logging": 0.0}
USUAL["other"] = 0.0


def means(**changes):
    """As usual, but for rank_N={phase: seconds}."""
    return {rank: {**USUAL, **changes.get(f"rank_{rank}", {})} for rank in range(8)}


def test_equal_ranks():
    assert slowest(means(), LAYOUT) is None


def test_a_slow_rank_and_where_it_loses_most():
    found = slowest(means(rank_6={"forward": 0.5, "backward": 0.9}), LAYOUT)
    assert (found.rank, found.phase, found.phase_seconds, found.phase_median) == (6, "backward", 0.9, 0.6)
    assert found.ratio == pytest.approx(1.46 / 0.96)


def test_waiting_for_others_is_not_slowness():
    assert slowest(means(rank_6={"communication": 9.0}), LAYOUT) is None


def test_a_heavier_stage_is_not_a_slow_rank():
    heavier = {f"rank_{rank}": {"forward": 0.9, "backward": 1.8} for rank in range(4, 8)}
    assert slowest(means(**heavier), LAYOUT) is None
    alone = Layout(8, 1, 1, 1, 1, (range(1),) * 8)
    assert slowest(means(rank_6={"forward": 9.0}), alone) is None


def test_the_slowest_of_two():
    found = slowest(means(rank_1={"data": 0.5}, rank_6={"data": 0.9}), LAYOUT)
    assert (found.rank, found.phase) == (6, "data")


def test_the_limit():
    middle = sum(seconds for phase, seconds in USUAL.items() if phase != "communication")
    for ratio, expected in ((RATIO - 0.01, None), (RATIO + 0.01, 2)):
        found = slowest(means(rank_2={"data": USUAL["data"] + (ratio - 1) * middle}), LAYOUT)
        assert (found and found.rank) == expected


def seen(steps, **changes):
    return {
        rank: Seen(
            Record(
                rank, 1, 1, "a", 1, 1, 0.0, steps, False, "", "", "", -1, dict.fromkeys(AXES, 0), steps,
                {part: 5.0 + steps * seconds for part, seconds in phases.items()},
            ), "runs", 0.0,
        )
        for rank, phases in means(**changes).items()
    }  # fmt: skip


def test_it_is_said_once_for_a_window_and_reason():
    assert set(USUAL) == set(PARTS)
    slow = {"rank_3": {"forward": 0.9}}
    stragglers = Stragglers(LAYOUT)
    assert stragglers.look(seen(0, **slow)) is None
    assert stragglers.look(seen(1, **slow)) is None
    assert stragglers.look(seen(WINDOW_STEPS, **slow)) is None  # the first step does not count
    found = stragglers.look(seen(1 + WINDOW_STEPS, **slow))
    assert (found.rank, found.phase, found.seconds) == (3, "forward", pytest.approx(1.56))
    assert stragglers.look(seen(2 + WINDOW_STEPS, **slow)) is None
    assert stragglers.look(seen(1 + 2 * WINDOW_STEPS, **slow)) is None  # known
    assert stragglers.look({**seen(999, **slow), 5: Seen(None, "missing", 0.0)}) is None
