"""What this rank does now, where others can read it even when this process is stopped: a record in shared memory.

`doing`, `begin_step` and `communicating` stand where a rank takes up something else; each costs microseconds, and next
to nothing while nobody has called `begin`. The record says what the host does: on a GPU it has enqueued that much, and
the device may be behind.
"""

import mmap
import os
import struct
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megacode.parallel.phases import PHASES, measure

AXES = ("tensor", "context", "data", "model", "world")
"""Groups of ranks in which collectives are counted; `data` is data x context, `model` pipeline x tensor (see Mesh)."""
PARTS = (*PHASES, "other")
"""What `Recorder.take` tells apart."""
DEVICE_WAIT = "wait for the device"
"""The kind of what `awaiting_device` marks."""

_IDENTITY = struct.Struct("<IIQ64s")
_BEAT = struct.Struct("<Q")
_MARK = struct.Struct(f"<Qdq?80s32s16si{len(AXES)}Q")
_PHASES = struct.Struct(f"<Q{len(PARTS)}d")
_BEAT_AT = _IDENTITY.size
_MARK_AT = _BEAT_AT + _BEAT.size
_PHASES_AT = _MARK_AT + _MARK.size
_SIZE = _PHASES_AT + _PHASES.size


@dataclass(frozen=True)
class Record:
    """A rank's heartbeat, as read. One read amid a change may mix old and new; a rank that stands still does not."""

    rank: int
    pid: int
    started: int
    """The kernel's clock at the process's start."""
    host: str
    beats: int
    """Counted by a thread of the process: it stands still when the process is stopped or its Python is held."""
    changes: int
    """How often the rank has taken up something else."""
    changed: float
    """When it last did, in Unix time."""
    step: int
    """The step it is in; 0 before the first."""
    patient: bool
    """Whether this may take long without a change: large files are read or written."""
    state: str
    """What it does."""
    kind: str
    """The communication it stands in, "" if none."""
    axis: str
    """One of AXES; "" where it waits for `peer` only."""
    peer: int
    """The rank on the other side of a transfer, -1 if none."""
    entered: dict[str, int]
    """Axis -> collectives of that axis entered so far."""
    steps: int
    """Steps whose phases have been measured."""
    seconds: dict[str, float]
    """Phase -> seconds, summed over those steps."""


class Heartbeat:
    """The record of this process.

    Args:
        path: the file, in shared memory; what an earlier process left there is taken away.
        rank, pid, started, host: who this is.

    Raises:
        OSError: there is no room, or no right to write.
    """

    def __init__(self, path: Path, rank: int, pid: int, started: int, host: str) -> None:
        self.path = path
        path.unlink(missing_ok=True)  # not truncated: a process that still has it mapped would be killed
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, _SIZE)  # a page that can't be had later is a SIGBUS
            self._memory = mmap.mmap(descriptor, _SIZE)
            self._inode = os.fstat(descriptor).st_ino
        finally:
            os.close(descriptor)
        _IDENTITY.pack_into(self._memory, 0, rank, pid, started, host.encode())
        self._beats = self._changes = self._steps = self.step = 0
        self._state, self._patient = b"starting", False
        self._kind, self._axis, self._peer = b"", b"", -1
        self._entered = [0] * len(AXES)
        self._seconds = [0.0] * len(PARTS)
        self.halted = False
        """Whoever takes something up stands still instead: the process ends in another thread."""
        self._mark()

    def _mark(self) -> None:
        self._changes += 1
        _MARK.pack_into(
            self._memory, _MARK_AT, self._changes, time.time(), self.step, self._patient, self._state, self._kind,
            self._axis, self._peer, *self._entered,
        )  # fmt: skip

    def unlink(self) -> None:
        """Take the file away, unless a later start has put its own there."""
        with suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def beat(self) -> None:
        """The process runs."""
        self._beats += 1
        _BEAT.pack_into(self._memory, _BEAT_AT, self._beats)

    def do(self, state: str, patient: bool) -> None:
        """See `doing`."""
        self._state, self._patient = state.encode(), patient
        self._mark()

    def enter(self, kind: str, axis: str, peer: int, counts: bool) -> tuple[bytes, bytes, int]:
        """A communication begins; returns what `leave` restores."""
        outer = (self._kind, self._axis, self._peer)
        self._kind, self._axis, self._peer = kind.encode(), axis.encode(), peer
        if counts:
            self._entered[AXES.index(axis)] += 1
        self._mark()
        return outer

    def leave(self, outer: tuple[bytes, bytes, int]) -> None:
        """It has ended."""
        self._kind, self._axis, self._peer = outer
        self._mark()

    def add_phases(self, seconds: dict[str, float]) -> None:
        """A step's seconds by phase."""
        self._steps += 1
        self._seconds = [total + seconds[part] for total, part in zip(self._seconds, PARTS, strict=True)]
        _PHASES.pack_into(self._memory, _PHASES_AT, self._steps, *self._seconds)


def read(path: Path) -> Record | None:
    """The record in a file; None where there is none, or one that is being made."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) != _SIZE:
        return None
    rank, pid, started, host = _IDENTITY.unpack_from(data, 0)
    (beats,) = _BEAT.unpack_from(data, _BEAT_AT)
    changes, changed, step, patient, state, kind, axis, peer, *entered = _MARK.unpack_from(data, _MARK_AT)
    steps, *seconds = _PHASES.unpack_from(data, _PHASES_AT)
    if not changes:
        return None
    return Record(
        rank, pid, started, _text(host), beats, changes, changed, step, patient, _text(state), _text(kind), _text(axis),
        peer, dict(zip(AXES, entered, strict=True)), steps, dict(zip(PARTS, seconds, strict=True)),
    )  # fmt: skip


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


_heartbeat: Heartbeat | None = None


def begin(path: Path, rank: int, pid: int, started: int, host: str) -> Heartbeat:
    """Keep the heartbeat of this process; arguments and errors as of `Heartbeat`."""
    global _heartbeat
    _heartbeat = Heartbeat(path, rank, pid, started, host)
    return _heartbeat


def end() -> None:
    """Keep it no more."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.unlink()
    _heartbeat = None


def begin_step(step: int) -> None:
    """From here on this rank is in a step, counted from 1."""
    if _heartbeat is not None:
        _heartbeat.step = step


def doing(state: str, patient: bool = False) -> None:
    """This rank takes something up; it must not wait for others in it, but where `communicating` says so.

    Args:
        state: at most 80 bytes of UTF-8; what is longer is cut.
        patient: whether it may take long without another mark.
    """
    mine = _heartbeat
    if mine is not None:
        while mine.halted:
            time.sleep(1.0)
        mine.do(state, patient)


def add_phases(seconds: dict[str, float]) -> None:
    """A step's seconds by phase, as `Recorder.take` gives them."""
    if _heartbeat is not None:
        _heartbeat.add_phases(seconds)


class _Wait:
    def __init__(
        self, heartbeat: Heartbeat, call: tuple[str, str, int, bool], phase: AbstractContextManager[None]
    ) -> None:
        self._heartbeat, self._call, self._phase = heartbeat, call, phase

    def __enter__(self) -> None:
        self._outer = self._heartbeat.enter(*self._call)
        self._phase.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase.__exit__(kind, error, trace)
        self._heartbeat.leave(self._outer)


def communicating(kind: str, axis: str = "", peer: int = -1) -> AbstractContextManager[None]:
    """Within, this rank takes part in a collective of an axis, or in a transfer from or to a peer: phase communication.

    All ranks of a group must enter the collectives of their axis in the same order.

    Args:
        kind: "all-reduce", "receive", ...; at most 32 bytes.
        axis: one of AXES for a collective.
        peer: the other rank of a transfer.
    """
    phase = measure("communication")
    return phase if _heartbeat is None else _Wait(_heartbeat, (kind, axis, peer, axis != ""), phase)


def finishing(kind: str, axis: str) -> AbstractContextManager[None]:
    """As `communicating`, for collectives of an axis that have been entered before or will be within."""
    phase = measure("communication")
    return phase if _heartbeat is None else _Wait(_heartbeat, (kind, axis, -1, False), phase)


def awaiting_device() -> AbstractContextManager[None]:
    """Within, the host waits for what it has enqueued: for other ranks perhaps, nobody knows for which."""
    return nullcontext() if _heartbeat is None else _Wait(_heartbeat, (DEVICE_WAIT, "", -1, False), nullcontext())


def waiting(kind: str, axis: str) -> AbstractContextManager[None]:
    """As `communicating`, but its time counts for the phase around it."""
    return nullcontext() if _heartbeat is None else _Wait(_heartbeat, (kind, axis, -1, True), nullcontext())
