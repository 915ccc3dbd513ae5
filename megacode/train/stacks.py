"""The Python stacks of a rank for RUN/stacks/, also of one that was stopped or whose interpreter is held."""

import ctypes
import faulthandler
import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from megacode.parallel.heartbeat import Record
from megacode.train.faults import Peer

WAKE_SECONDS = 3.0
"""How long ranks that were stopped or held have to tell of themselves."""


class Stacks:
    """Writes this rank's stacks, and asks others of its machine for theirs.

    SIGCONT makes a process write its stacks to shared memory: in the signal's handler, which needs neither the
    interpreter nor another thread, and before a stopped process goes on.

    Args:
        run: the run folder.
        shared: a folder in shared memory.
        me: this rank.
    """

    def __init__(self, run: Path, shared: Path, me: Peer) -> None:
        self.folder, self.shared, self.me = run / "stacks", shared, me
        self._woken = self._woken_file(me.rank).open("wb", buffering=0)
        faulthandler.register(signal.SIGCONT, file=self._woken, all_threads=True)

    def close(self) -> None:
        """Let SIGCONT be what it was."""
        faulthandler.unregister(signal.SIGCONT)

    def clear(self) -> None:
        """Take away what was kept in shared memory."""
        with suppress(OSError):
            self._woken_file(self.me.rank).unlink()

    def forget(self) -> None:
        """Nobody will ask what this process was at when it was last woken."""
        self._woken.seek(0)
        self._woken.truncate()

    def write(self) -> None:
        """The stacks of this process's threads: as they were when it was woken, if it was, and as they are."""
        time.sleep(0.1)  # the signal that woke this process may not have reached the main thread
        path = self._file(self.me.rank, self.me.pid)
        temporary = path.with_suffix(".tmp")
        self.folder.mkdir(exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(_head(self.me.rank, self.me.host, self.me.pid))
            if woken := self._woken_file(self.me.rank).read_text(encoding="utf-8", errors="replace"):
                file.write(f"When it was woken:\n{woken}\nNow:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        os.replace(temporary, path)

    def wait(self, processes: Iterable[tuple[int, int]], asleep: Iterable[Record], seconds: float) -> None:
        """Wait until the stacks of some processes stand in the run folder, some seconds at most.

        Args:
            processes: whom to wait for; rank and process id.
            asleep: ranks of this machine to wake; what one that can't write itself has left is written for it.
            seconds: how long.
        """
        by_process = {(record.rank, record.pid): record for record in asleep}
        for record in by_process.values():
            _wake(record.pid)
        began, left = time.monotonic(), set(processes)
        while left and time.monotonic() < began + seconds:
            time.sleep(0.1)
            left = {process for process in left if not self._file(*process).exists()}
            if time.monotonic() > began + WAKE_SECONDS:
                for process in left & set(by_process):
                    self._write_for(by_process[process])

    def _write_for(self, record: Record) -> None:
        with suppress(OSError):
            woken = self._woken_file(record.rank).read_text(encoding="utf-8", errors="replace")
            if woken:
                head = _head(record.rank, record.host, record.pid)
                self._file(record.rank, record.pid).write_text(f"{head}When it was woken:\n{woken}", encoding="utf-8")

    def _file(self, rank: int, pid: int) -> Path:
        return self.folder / f"rank_{rank:05d}_process_{pid}.txt"  # what an earlier start left stays

    def _woken_file(self, rank: int) -> Path:
        return self.shared / f"woken_{rank:05d}.txt"


def _wake(pid: int) -> None:
    """Send SIGCONT to a process's main thread: any thread may handle what is sent to the process, the main one going on
    meanwhile.
    """
    ctypes.CDLL(None).tgkill(pid, pid, int(signal.SIGCONT))


def _head(rank: int, host: str, pid: int) -> str:
    return f"rank {rank}, host {host}, process {pid}, {datetime.now().astimezone().isoformat(timespec='seconds')}\n\n"
