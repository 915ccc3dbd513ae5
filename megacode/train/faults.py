"""What can come between a run and its end: requests to stop or save, ranks that die, and how the others hear of it."""

import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from megacode.train import interrupt

FILES = ("STOP", "SAVE")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_LOOK_SECONDS = 1.0
_WATCH_SECONDS = 0.5
_LOST = re.compile(r"Connection (?:closed|reset) by peer|Broken pipe|ncclRemoteError")
_LOOKS_BETWEEN = 10
"""So many looks at the processes of this machine for one at the run folder, which all ranks of all machines share."""


@dataclass(frozen=True)
class Asked:
    """What all ranks have agreed on at a step's end."""

    stop: str | None
    """Who asked to save and stop, or None."""
    save: bool
    """Whether somebody asked for a checkpoint now."""


class Requests:
    """Requests to stop or save: one of SIGNALS to any rank (SIGINT: Ctrl-C), or a file STOP or SAVE in the run folder.

    A file that holds a number asks for the end of that step; an empty one, and a signal, for the end of this one. What
    else a file may hold asks for nothing, and is told once.
    A rank only takes notes. What counts is the sum over all ranks, which rides on the step's all-reduce of the loss, so
    that every rank acts at the same step's end.

    Args:
        run: the run folder.
        looks: whether this rank looks for the files (one does, once a second at most).
    """

    def __init__(self, run: Path, looks: bool) -> None:
        self.run, self.looks = run, looks
        self._seen = [0.0] * (len(FILES) + len(SIGNALS))
        self._next_look = 0.0
        self._due: list[float] = [math.inf] * len(FILES)
        self._looked: dict[str, tuple[str, int] | None] = {}
        """What each file was when it was last looked at."""
        self._told: set[tuple[str, str]] = set()
        self._taken: dict[str, tuple[str, int] | None] = {}
        """Files that are being obeyed, and what they were then: they do not ask again."""

    def clear_old(self, step: int, since_ns: int, again: bool) -> None:
        """Say what files lie there from before a start. Taken away are those that asked an earlier run.

        A number of a step to come asks this run, and so does what was written since the start began.

        Args:
            step: that the start goes on from.
            since_ns: when it began, by the clock of the file system [ns].
            again: whether a job starts again by itself: what was asked between its starts was meant for it.
        """
        for name in FILES:
            file, due, found = self.run / name, self._due_step(name), self._looked[name]
            if found is None or math.isinf(due) or found[1] >= since_ns:
                continue
            if due > step:
                text = f"was there before this start: obeyed after step {due}"
            elif again:
                text = "was there before this start, which the job has made by itself: obeyed after the first step"
            else:
                file.unlink(missing_ok=True)
                text = "was there before this start, asked an earlier run and is removed; write it anew to ask this one"
            print(f"{file} {text}", file=sys.stderr, flush=True)

    def listen(self) -> None:
        """Take note of signals from now on; before, they end the process, and so does a second Ctrl-C."""
        interrupt.over()

        def note(number: int, frame: FrameType | None) -> None:
            self._seen[len(FILES) + SIGNALS.index(signal.Signals(number))] = 1.0
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        for each in SIGNALS:
            signal.signal(each, note)

    def rest(self) -> None:
        """The run is over. SLURM's warnings come again and again, and must not kill the interpreter while it ends."""
        for each in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(each, signal.SIG_IGN)

    def noted(self, step: int) -> torch.Tensor:
        """[files + signals] what this rank has noted for the end of a step: 1 or 0, on the host."""
        if self.looks and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            self._due = [self._due_step(name) for name in FILES]
        due_steps = zip(FILES, self._due, strict=True)
        self._seen[: len(FILES)] = [float(step >= due and name not in self._taken) for name, due in due_steps]
        return torch.tensor(self._seen)

    def agree(self, totals: Sequence[float]) -> Asked:
        """What follows from the sums of `noted` over all ranks."""
        names = [f"the file {self.run / 'STOP'}", "", *(each.name for each in SIGNALS)]
        save = totals[FILES.index("SAVE")] > 0
        stop = next((name for name, total in zip(names, totals, strict=True) if name and total > 0), None)
        return Asked(stop, save)

    def take(self, asked: Asked) -> None:
        """What was asked is being done: the files that asked for it ask for no more until `done`.

        A file whose step is still to come has asked for nothing, though somebody else has.
        """
        doing = {"STOP": asked.stop is not None, "SAVE": asked.save}
        seen = zip(FILES, self._seen, strict=False)
        self._taken |= {name: self._looked[name] for name, asks in seen if asks and doing[name]}

    def done(self) -> None:
        """Take away the files that asked for what has been done now; one that was written anew meanwhile asks anew."""
        if self.looks:
            for name, obeyed in self._taken.items():
                if self._read(name) == obeyed:
                    (self.run / name).unlink(missing_ok=True)
            self._next_look = 0.0
        self._taken.clear()

    def _due_step(self, name: str) -> float:
        """The step at whose end a file asks for something: never where it is not there, at once where it is empty."""
        file, found = self.run / name, self._read(name)
        self._looked[name] = found
        if found is None:
            return math.inf
        text, written_ns = found
        if not text:  # `echo 5000 > STOP` makes it empty first
            return 0 if time.time_ns() - written_ns > 500_000_000 else math.inf
        if text.isdecimal():
            return int(text)
        if (name, text) not in self._told:
            self._told.add((name, text))
            mend = f"write the number of a step, or empty it (: > {file}) for now"
            print(f"{file} is ignored: it holds {text[:40]!r}; {mend}", file=sys.stderr, flush=True)
        return math.inf

    def _read(self, name: str) -> tuple[str, int] | None:
        """What a file holds, and when that was written [ns]; None where it is not there."""
        file = self.run / name
        try:
            return file.read_text(encoding="utf-8", errors="replace").strip(), file.stat().st_mtime_ns
        except OSError:
            return None


@dataclass(frozen=True)
class Peer:
    """A rank's process."""

    rank: int
    host: str
    pid: int
    started: int | None
    """The kernel's clock at its start: a number is given to another process one day."""


def this_process(rank: int) -> Peer:
    """This rank, as the others are told of it."""
    return Peer(rank, socket.gethostname(), os.getpid(), _started(os.getpid()))


def lost_connection(error: BaseException) -> str | None:
    """What a backend says where the process at the other end is gone, or the network between; None of other errors."""
    if not isinstance(error, RuntimeError) or _LOST.search(str(error)) is None:
        return None
    # "[.../gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:434: Connection reset by peer. This is typically ..."
    return re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0].partition("\n")[0]


def _stat(pid: int) -> tuple[str, int] | None:
    """A process's state, as ps shows it, and when it started, in the kernel's ticks; None where it is gone, or dead and
    not yet fetched.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (fields[0], int(fields[19]))


def _started(pid: int) -> int | None:
    stat = _stat(pid)
    return None if stat is None else stat[1]


def process_state(pid: int, started: int) -> str | None:
    """The state of a process, as ps shows it ("T": stopped); None where it is gone."""
    stat = _stat(pid)
    return None if stat is None or stat[1] != started else stat[0]


class PeerWatch:
    """Ends this rank within seconds of another rank's death on this machine.

    The others would wait in a collective for the dead one, and a launcher's SIGTERM only asks them to stop at a step's
    end that never comes. Of other machines a rank hears by `failed`, as soon as the run folder shows it.

    Args:
        peers: all ranks.
        rank: this rank.
        failed: whether this rank is known to wait for nothing; asked every 5 seconds.
        on_loss: called, in a thread, with the ranks that are gone and whether this rank is the one to tell; it ends the
            process.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        rank: int,
        failed: Callable[[], bool],
        on_loss: Callable[[list[Peer], bool], None],
    ) -> None:
        me = next(peer for peer in peers if peer.rank == rank)
        # In containers of their own, ranks of one machine may not see each other's processes.
        seen = [peer for peer in peers if peer.host == me.host and _started(peer.pid) == peer.started is not None]
        self.rank, self.peers = rank, [peer for peer in seen if peer.rank != rank]
        self._failed, self._on_loss = failed, on_loss
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peer watch", daemon=True)

    def start(self) -> None:
        """Watch until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """From here on the others may end."""
        self._over.set()

    def gone(self) -> list[Peer]:
        """The ranks of this machine that have ended."""
        return [peer for peer in self.peers if _started(peer.pid) != peer.started]

    def wait_for_gone(self, seconds: float) -> list[Peer]:
        """As `gone`; a rank that dies closes its connections a little before the kernel says that it is gone."""
        deadline = time.monotonic() + seconds
        while not (gone := self.gone()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return gone

    def _watch(self) -> None:
        looks = 0
        while not self._over.wait(_WATCH_SECONDS):
            gone, looks = self.gone(), looks + 1
            in_vain = looks % _LOOKS_BETWEEN == 0 and self._failed()
            if (gone or in_vain) and not self._over.is_set():
                left = {self.rank, *(peer.rank for peer in self.peers)} - {peer.rank for peer in gone}
                self._on_loss(gone, self.rank == min(left))
