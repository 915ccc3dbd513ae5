"""The rank that makes the others wait: by the seconds that each spends outside communication. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from megacode.plan.layout import Layout
from megacode.train.verdict import Seen

WINDOW_STEPS = 20
RATIO = 1.2


@dataclass(frozen=True)
class Straggler:
    """A rank that needs clearly longer for its part of a step than others do for the same."""

    rank: int
    seconds: float
    """A step, without communication."""
    ratio: float
    """To the median of the ranks of its stage."""
    phase: str
    """Where it loses most."""
    phase_seconds: float
    phase_median: float


class Stragglers:
    """Looks at windows of steps as the heartbeats tell of them; says what is new.

    A rank's seconds without communication, the mean of at least WINDOW_STEPS steps, are compared with the median of
    the ranks of its pipeline stage, which have the same to do; RATIO times that is reported. A stage of one rank is
    compared with nothing: it may just hold more of the model. The first step is left out.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._begin: dict[int, tuple[int, dict[str, float]]] = {}
        self._last: tuple[int, str] | None = None

    def look(self, seen: Mapping[int, Seen]) -> Straggler | None:
        """The slowest rank, if a window has ended and it was not the last window's for the same reason."""
        now = {rank: (r.steps, r.seconds) for rank, each in seen.items() if (r := each.record) is not None and r.steps}
        if len(now) < self.layout.world_size:
            return None
        self._begin = self._begin or now
        steps = {rank: now[rank][0] - self._begin[rank][0] for rank in now}
        if min(steps.values()) < WINDOW_STEPS:
            return None
        means = {
            rank: {phase: (total - self._begin[rank][1][phase]) / steps[rank] for phase, total in now[rank][1].items()}
            for rank in now
        }
        self._begin = now
        found = slowest(means, self.layout)
        last, self._last = self._last, None if found is None else (found.rank, found.phase)
        return None if self._last == last else found


def slowest(means: Mapping[int, Mapping[str, float]], layout: Layout) -> Straggler | None:
    """The rank that is furthest above its stage's median, if it is RATIO times that.

    Args:
        means: of each rank, seconds a step by phase.
        layout: whose stages are compared, each by itself.
    """
    size = layout.world_size // layout.pipeline
    found = None
    for first in range(0, layout.world_size, size):
        stage = {
            rank: {phase: seconds for phase, seconds in means[rank].items() if phase != "communication"}
            for rank in range(first, first + size)
        }
        totals = {rank: sum(phases.values()) for rank, phases in stage.items()}
        rank = max(totals, key=totals.__getitem__)
        ratio = totals[rank] / middle if (middle := median(totals.values())) else 1.0
        if ratio >= RATIO and (found is None or ratio > found.ratio):
            medians = {phase: median(phases[phase] for phases in stage.values()) for phase in stage[rank]}
            phase = max(medians, key=lambda name: stage[rank][name] - medians[name])
            found = Straggler(rank, totals[rank], ratio, phase, stage[rank][phase], medians[phase])
    return found
