"""Ctrl-C or SIGTERM while a run starts: a line, and its end. After the start they are requests (see `faults`).

Imported before torch, which takes seconds; so nothing large may be imported here.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and has saved, or was before its first step: start it again and it goes on
(EX_TEMPFAIL)."""
EXIT_INTERRUPTED = 130
"""Exit code of a start that Ctrl-C has ended, as shells have it."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 3.0
"""How long the main thread has to come out of native code: it waits there for other ranks, perhaps for minutes."""


class Interrupted(BaseException):
    """Raised in the main thread, so that what it holds is given back: a half-built extension's lock, say."""


class _Start:
    """Where SIGINT or SIGTERM end a process."""

    def __init__(self) -> None:
        self.number = 0
        """The signal that came."""
        self._raised = False
        self.settled = False
        """Whether the process ends for another reason, which a signal must not keep it from telling."""
        self.said: Callable[[str], str] = lambda name: name
        self._ending = threading.Lock()
        # Python's handlers wait for the main thread; the system's part of them writes here at once.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for each in SIGNALS:
            if signal.getsignal(each) is not signal.SIG_IGN:  # who started this wants it so
                signal.signal(each, self._interrupt)
        threading.Thread(target=self._watch, args=(reader,), name="start", daemon=True).start()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._raised and not self.settled:
            self._raised, self.number = True, number
            raise Interrupted

    def _watch(self, reader: int) -> None:
        read = os.read(reader, 1)
        os.close(reader)
        if read:
            self.number = read[0]
            time.sleep(GRACE_SECONDS)
            if not self.settled:
                self.end(self.number)

    def end(self, number: int) -> NoReturn:
        """Say so, once a machine, and end this process."""
        with self._ending:
            try:
                sys.stderr = sys.__stderr__ or sys.stderr  # torch's excepthook has put a buffer in its place
                name = self.said(signal.Signals(number).name)
                if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
                    who = name if name != "SIGTERM" else "SIGTERM, which launchers send when a rank has died, too"
                    text = f"stopped before the first step: asked by {who}; nothing is lost, start again to go on"
                    print(text, file=sys.stderr, flush=True)
            finally:
                os._exit(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED)

    def uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Of the main thread; an import may have made another error of `Interrupted`."""
        if self.number:
            self.end(self.number)
        sys.__excepthook__(kind, error, trace)

    def close(self) -> None:
        """Signals mean something else from now on."""
        signal.set_wakeup_fd(-1)
        os.close(self._writer)


_start: _Start | None = None


def begin() -> None:
    """From here on SIGINT and SIGTERM end this process with a line, until `over`."""
    global _start
    _start = _Start()
    sys.excepthook = _start.uncaught


def over() -> None:
    """The start is over; does nothing where it has not begun here."""
    global _start
    if _start is not None:
        _start.close()
    _start = None


def at_end(said: Callable[[str], str]) -> None:
    """Call this before the line is said.

    Args:
        said: gets the signal's name, perhaps in a thread of its own; returns who is to be named.
    """
    if _start is not None:
        _start.said = said


def settle(stopped: Callable[[], bool]) -> None:
    """This rank is about to tell a failure: no signal comes between from here on. Where the failure follows from a
    signal, to this rank or to one that has stopped the start, that is said instead, and the process ends here.

    Args:
        stopped: whether another rank has.
    """
    if _start is not None:
        _start.settled = True
        if _start.number or stopped():
            _start.end(_start.number or signal.SIGTERM)
