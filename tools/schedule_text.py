"""The timeline of a pipeline schedule as lines of plain text, no wider than a terminal. Pure."""

import math
import string
import textwrap
from dataclasses import dataclass

from megacode.parallel.timeline import Timed, Timeline

IDLE = "."
FILLS = {"forward": "-", "backward": "="}
CUT = " ~~ "
"""Stands where a long step's middle is left out."""
LEAST_WIDTH = 40


@dataclass(frozen=True)
class Scale:
    """How time becomes columns."""

    columns: int
    """Of one unit of time."""
    numbered: bool
    """Whether operations show their micro-batch, or a letter alone."""

    def column(self, time: float) -> int:
        """Where a moment lies, counted from the step's begin. Halves always go up, so that equal times look equal."""
        return math.floor(time * self.columns + 0.5 + 1e-9)


def schedule_text(timeline: Timeline, virtual_stages: int, width: int) -> list[str]:
    """A line a pipeline rank, then one with the times at the edges, then what the signs mean.

    Of a step that is too long for the width the beginning and the end are drawn, with `CUT` between them. Numbers are
    left out where that lets the first rank's first backward be seen.

    Args:
        timeline: the step.
        virtual_stages: chunks a rank.
        width: columns of the terminal; below 40 as 40.
    """
    width = max(width, LEAST_WIDTH)
    titles = [f"rank {rank} " for rank in range(len(timeline.ranks))]
    margin = len(titles[-1])
    scale = _scale(timeline, virtual_stages, width - margin)
    end = scale.column(timeline.duration)
    windows = _windows(end, width - margin)
    lines = [
        title.ljust(margin) + CUT.join(_row(rank, window, scale, virtual_stages) for window in windows)
        for title, rank in zip(titles, timeline.ranks, strict=True)
    ]
    edges = [
        [_time(timeline.duration if column == end else column / scale.columns) for column in window]
        for window in windows
    ]
    axis = [
        low + high.rjust(stop - start - len(low)) for (low, high), (start, stop) in zip(edges, windows, strict=True)
    ]
    lines.append(" " * margin + (" " * len(CUT)).join(axis))
    return [*lines, *textwrap.wrap("; ".join(_signs(timeline, virtual_stages, scale, windows)), width)]


def _signs(timeline: Timeline, virtual_stages: int, scale: Scale, windows: list[tuple[int, int]]) -> list[str]:
    numbers = ""
    if scale.numbered:
        numbers = ", then micro-batch" + (" and chunk (a, b, ...)" if virtual_stages > 1 else "")
    signs = [f"F forward, B backward{numbers}", f"{IDLE} idle", "time in forwards of one chunk"]
    if not scale.numbered:
        signs.append("no room for numbers")
    if len(windows) > 1:
        left_out = (windows[1][0] - windows[0][1]) / scale.columns
        signs.append(f"{CUT.strip()} {_time(left_out)} of {_time(timeline.duration)} left out")
    return signs


def _time(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def _chunk_letters(chunk: int) -> str:
    """a to z, then aa, ab, ..."""
    before, last = divmod(chunk, 26)
    return (_chunk_letters(before - 1) if before else "") + string.ascii_lowercase[last]


def _name(timed: Timed, virtual_stages: int) -> str:
    """F3 is the forward of micro-batch 3, B3b its backward through the second of several chunks."""
    operation = timed.operation
    letters = _chunk_letters(operation.chunk) if virtual_stages > 1 else ""
    return f"{operation.kind[0].upper()}{operation.micro_batch}{letters}"


def _scale(timeline: Timeline, virtual_stages: int, room: int) -> Scale:
    """Columns enough for every name if the step, or what has to be seen of it, then fits; else for letters."""
    operations = timeline.ranks[0]
    shortest = min(1.0, operations[-1].stop - operations[-1].start)
    longest = max(len(_name(timed, virtual_stages)) for timed in operations)
    numbered = Scale(math.ceil(longest / shortest - 1e-9), numbered=True)
    first_back = next(timed.stop for timed in operations if timed.operation.kind == "backward")
    windows = _windows(numbered.column(timeline.duration), room)
    if len(windows) == 1 or numbered.column(first_back) <= windows[0][1]:
        return numbered
    return Scale(math.ceil(1 / shortest - 1e-9), numbered=False)


def _windows(columns: int, room: int) -> list[tuple[int, int]]:
    """Spans of columns that are drawn."""
    if columns <= room:
        return [(0, columns)]
    part = (room - len(CUT)) // 2
    return [(0, part), (columns - part, columns)]


def _row(rank: tuple[Timed, ...], window: tuple[int, int], scale: Scale, virtual_stages: int) -> str:
    """A rank's operations within a window of columns. One that is cut shows its letter only where it begins."""
    start, stop = window
    row, drawn = "", start
    for timed in rank:
        begin, end = scale.column(timed.start), scale.column(timed.stop)
        if end <= start:
            continue
        if begin >= stop:
            break
        low, high = max(begin, start), min(end, stop)
        name = _name(timed, virtual_stages)
        if not scale.numbered or len(name) > high - low:
            name = name[0]
        if begin < start:
            name = ""
        row += IDLE * (low - drawn) + name.ljust(high - low, FILLS[timed.operation.kind])
        drawn = high
    return row + IDLE * (stop - drawn)
