"""Who waits for whom, from what all ranks tell of themselves when none goes on. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from megacode.parallel.heartbeat import DEVICE_WAIT, Record
from megacode.plan.layout import Layout

Process = Literal["runs", "held", "stopped", "ended", "unheard", "missing"]
"""Runs; runs, but no Python in it (native code that does not let go of the interpreter); is stopped by a signal; has
ended; is on a machine that is not heard of any more; has not been heard of in this start."""

FROZEN: tuple[Process, ...] = ("stopped", "ended", "unheard", "missing")
"""What can't go on, whatever it waits for."""

_VARYING = {
    "tensor": ("tensor",), "context": ("context",), "data": ("data", "context"), "model": ("pipeline", "tensor"),
    "world": ("pipeline", "data", "context", "tensor"),
}  # fmt: skip
"""Axis -> the dimensions of the grid that its groups run along, as `build_mesh` makes them."""


@dataclass(frozen=True)
class Seen:
    """A rank, as it is seen from outside."""

    record: Record | None
    """None: it is missing."""
    process: Process
    still_seconds: float
    """How long it has not gone on."""


@dataclass(frozen=True)
class Verdict:
    """What is said of a stall."""

    culprits: list[int]
    """Ranks that wait for nobody and for which, directly or not, the others do; those that can't go on first."""
    conclusion: str
    """One line."""
    table: str
    """A few lines, one for the ranks that stand in the same."""


def judge(seen: Mapping[int, Seen], layout: Layout) -> Verdict:
    """Follow who waits for whom to the ranks that wait for nobody, or to a circle.

    Args:
        seen: every rank.
        layout: gives the groups of the axes.
    """
    awaited = {rank: waits_for(rank, seen, layout) for rank in seen}
    culprits = sorted(roots(awaited), key=lambda rank: _suspicion(seen[rank]))
    seconds = max(seen[rank].still_seconds for rank in seen)
    groups: dict[tuple[tuple[str, str], bool], list[int]] = {}
    for rank in culprits:
        groups.setdefault((_place(rank, seen, layout), bool(awaited[rank])), []).append(rank)
    conclusion = f"stalled for {seconds:.0f} s: " + "; ".join(
        _blame(ranks, seen, layout, circle) for (_, circle), ranks in groups.items()
    )
    if others := sorted(set(seen) - set(culprits)):
        waits, them = "wait" if len(others) > 1 else "waits", "it" if len(culprits) == 1 else "them"
        conclusion += f"; {spans(others)} {waits} for {them}"
    return Verdict(culprits, conclusion, _table(seen, awaited, layout))


def waits_for(rank: int, seen: Mapping[int, Seen], layout: Layout) -> set[int]:
    """The ranks that a rank can't go on without: none where it does not wait, can't go on by itself, or stands in a
    collective that all have entered.

    One that waits for its device may wait for any that does not.
    """
    this = seen[rank]
    if this.record is None or this.process in FROZEN or not this.record.kind:
        return set()
    if this.record.kind == DEVICE_WAIT:
        return {other for other, each in seen.items() if each.record is None or each.record.kind != DEVICE_WAIT}
    axis = this.record.axis
    if not axis:
        return {this.record.peer} if this.record.peer >= 0 else set()
    late = set()
    for member in members(rank, axis, layout):
        other = seen[member].record
        if other is None or other.entered[axis] < this.record.entered[axis]:
            late.add(member)
        elif seen[member].process in FROZEN and other.entered[axis] == this.record.entered[axis]:
            late.add(member)  # within the collective, which the backend's threads carry on: they stand still as well
    return late - {rank}


def members(rank: int, axis: str, layout: Layout) -> list[int]:
    """The ranks of this rank's group of an axis, rising."""
    first, stride, offsets = rank, 1, [0]
    for dimension in ("tensor", "context", "data", "pipeline"):  # fastest first
        size = getattr(layout, dimension)
        if dimension in _VARYING[axis]:
            first -= rank // stride % size * stride
            offsets = [index * stride + offset for index in range(size) for offset in offsets]
        stride *= size
    return sorted(first + offset for offset in offsets)


def roots(awaited: Mapping[int, set[int]]) -> list[int]:
    """The ranks that wait for nobody; and those of a circle from which no way leads to one that waits for nobody."""
    reached = {rank: _reached(rank, awaited) for rank in awaited}
    free = {rank for rank in awaited if not awaited[rank]}
    return sorted(rank for rank in awaited if rank in free or (rank in reached[rank] and not reached[rank] & free))


def _suspicion(seen: Seen) -> int:
    if seen.process in FROZEN:
        return 0
    return 1 if seen.process == "held" else 2


def _reached(rank: int, awaited: Mapping[int, set[int]]) -> set[int]:
    found: set[int] = set()
    ahead = list(awaited[rank])
    while ahead:
        next_one = ahead.pop()
        if next_one not in found:
            found.add(next_one)
            ahead += awaited[next_one]
    return found


def spans(ranks: Iterable[int]) -> str:
    """Ranks in words: "rank 3", "ranks 0-2, 5"."""
    ranks = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    numbers = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return f"rank{'s' if len(ranks) != 1 else ''} {numbers}"


def _blame(ranks: list[int], seen: Mapping[int, Seen], layout: Layout, circle: bool) -> str:
    """Ranks that stand in the same, and in what; `circle`: they wait for others that wait for them."""
    record, process = seen[ranks[0]].record, seen[ranks[0]].process
    several = len(ranks) > 1
    who = spans(ranks)
    if record is None:
        return f"{who} {'have' if several else 'has'} not started, or ended before anybody saw"
    if not several:
        who += f" (host {record.host}, process {record.pid})"
    be = "are" if several else "is"
    verb = {
        "runs": "stand in" if several else "stands in",
        "held": f"{be} held in native code in",
        "stopped": f"{be} stopped in",
        "ended": f"{'have' if several else 'has'} ended in",
        "unheard": f"{be} not heard of any more, last in",
    }[process]
    end = ""
    if circle:
        end = ", in a circle"
    elif process == "runs" and record.axis:
        end = ", which all have entered and which does not end"
    return f"{who} {verb} {_place(ranks[0], seen, layout)[1]}{end}"


def _place(rank: int, seen: Mapping[int, Seen], layout: Layout) -> tuple[str, str]:
    """(how the process is, what it stands in)."""
    record = seen[rank].record
    if record is None:
        return "missing", "not started"
    where = record.state + (f" of step {record.step}" if record.step else "")
    if record.kind:
        where = f"{_communication(rank, record, layout)} in {where}"
    return seen[rank].process, where


def _communication(rank: int, record: Record, layout: Layout) -> str:
    if record.axis:
        return f"{record.kind} of {record.axis} {spans(members(rank, record.axis, layout))}"
    if record.peer < 0:
        return record.kind
    return f"{record.kind} {'to' if record.kind == 'send' else 'from'} rank {record.peer}"


def _table(seen: Mapping[int, Seen], awaited: Mapping[int, set[int]], layout: Layout) -> str:
    rows: dict[tuple[tuple[str, str], tuple[int, ...]], list[int]] = {}
    for rank in sorted(seen):
        rows.setdefault((_place(rank, seen, layout), tuple(sorted(awaited[rank]))), []).append(rank)
    lines = [("who", "host", "process", "stands in", "waits for", "since")]
    for ((process, where), others), ranks in rows.items():
        hosts = sorted({record.host for rank in ranks if (record := seen[rank].record) is not None})
        host = hosts[0] if len(hosts) == 1 else f"{len(hosts)} hosts" if hosts else "-"
        since = min(seen[rank].still_seconds for rank in ranks)
        lines.append((spans(ranks), host, process, where, spans(others) if others else "-", f"{since:.0f} s"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
