"""What a rank sees of the others' heartbeats: those of its machine in shared memory, the rest in the run folder.

The lowest rank of a machine that runs publishes all heartbeats of the machine, also those of stopped processes, as
RUN/heartbeats/rank_RANK.json. Nothing here compares clocks of two machines: what does not change is old.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megacode.parallel.heartbeat import Record, read
from megacode.train.faults import process_state
from megacode.train.verdict import Process

SHARED = Path("/dev/shm")
SLACK_SECONDS = 5.0
"""How much later than planned a thread of a busy machine may look."""

Sight = Mapping[int, tuple[Record, Process]]
"""Rank -> its heartbeat, and how its process is."""


def shared_folder(run: Path, root: Path = SHARED) -> Path:
    """Where the ranks of one machine keep the heartbeats of a run."""
    name = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16]
    folder = root / f"megacode-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class Ages:
    """When each thing was last seen to change."""

    def __init__(self) -> None:
        self._last: dict[Any, tuple[Any, float]] = {}

    def seconds(self, name: Any, value: Any) -> float:
        """How long `name` has had `value`, as far as was seen."""
        now = time.monotonic()
        if name not in self._last or self._last[name][0] != value:
            self._last[name] = (value, now)
        return now - self._last[name][1]

    def forget(self) -> None:
        """Begin anew."""
        self._last.clear()


class Machine:
    """The heartbeats of this machine.

    Args:
        folder: as of `shared_folder`.
        period_seconds: between looks, here and in other processes.
    """

    def __init__(self, folder: Path, period_seconds: float) -> None:
        self.folder, self.patience_seconds = folder, 3 * period_seconds + SLACK_SECONDS
        self._ages = Ages()
        self._known: set[tuple[int, int, int]] = set()

    def look(self) -> Sight:
        """All ranks of this machine whose processes live, or lived when this process first looked."""
        seen: dict[int, tuple[Record, Process]] = {}
        for path in sorted(self.folder.glob("rank_" + "[0-9]" * 5)):
            if (record := read(path)) is not None and (process := self._process(record)) is not None:
                seen[record.rank] = (record, process)
        return seen

    def _process(self, record: Record) -> Process | None:
        name = (record.rank, record.pid, record.started)
        state = process_state(record.pid, record.started)
        if state is None:
            return "ended" if name in self._known else None  # what an earlier start left
        self._known.add(name)
        if state in "Tt":
            return "stopped"
        return "held" if self._ages.seconds(name, record.beats) > self.patience_seconds else "runs"


class Others:
    """The heartbeats of all machines, as published in a run folder."""

    def __init__(self, run: Path, period_seconds: float) -> None:
        self.folder, self.patience_seconds = run / "heartbeats", 30 + 6 * period_seconds
        self._ages = Ages()
        self._left_over: dict[Path, bytes] | None = None
        self._last: dict[Path, tuple[bytes, list[tuple[Record, Process]]]] = {}

    def publish(self, rank: int, machine: Sight) -> None:
        """Write what this machine's ranks do.

        Over the old file: on network file systems a file that is opened is looked up anew, a name may not be.
        """
        self.folder.mkdir(exist_ok=True)
        lines = [{**asdict(record), "process": process} for record, process in machine.values()]
        with _file(self.folder, rank).open("w", encoding="utf-8") as file:
            json.dump(lines, file)

    def look(self) -> Sight:
        """All ranks that some machine has told of since this process first looked."""
        for path in self.folder.glob("rank_*.json"):
            with suppress(OSError, ValueError, TypeError, KeyError):  # half written: what it said before counts
                text = path.read_bytes()
                self._last[path] = (text, [_read_line(line) for line in json.loads(text)])
        if self._left_over is None:
            self._left_over = {path: text for path, (text, _) in self._last.items()}
        seen: dict[int, tuple[float, Record, Process]] = {}
        for path, (text, lines) in self._last.items():
            age = self._ages.seconds(path, text)
            if self._left_over.get(path) == text:
                continue
            self._left_over.pop(path, None)
            for record, process in lines:
                if record.rank not in seen or age < seen[record.rank][0]:
                    seen[record.rank] = (age, record, "unheard" if age > self.patience_seconds else process)
        return {rank: (record, process) for rank, (_, record, process) in seen.items()}


def _read_line(line: dict[str, Any]) -> tuple[Record, Process]:
    return Record(**{key: value for key, value in line.items() if key != "process"}), line["process"]


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"
