"""Processes of this machine that share the units of a job."""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from megacode.data.preparing.job import Job
from megacode.data.preparing.parts import run_unit
from megacode.data.preparing.streams import OnBytes
from megacode.errors import UserError

_TELL_SECONDS = 0.2


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_units(job: Job, units: Sequence[int], workers: int, on_bytes: OnBytes) -> None:
    """Run units, in this process for one worker, else in so many others.

    Raises:
        UserError: what a worker raised, or it was killed. The others are ended; finished parts stay.
    """
    if workers == 1 or len(units) <= 1:
        for unit in units:
            run_unit(job, unit, on_bytes)
        return
    with _started(job.folder, min(workers, len(units))) as pool:
        left = iter(units)
        for worker in pool:
            worker.give(next(left, None))
        while busy := [worker for worker in pool if worker.unit is not None]:
            ready = wait([worker.connection for worker in busy])
            for worker in busy:
                if worker.connection in ready and worker.take(on_bytes):
                    worker.give(next(left, None))


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    unit: int | None = None

    def give(self, unit: int | None) -> None:
        self.unit = unit
        if unit is not None:
            with contextlib.suppress(OSError):  # that it has ended is found where its answer is waited for
                self.connection.send(unit)

    def take(self, on_bytes: OnBytes) -> bool:
        """Take one message; whether the unit is done.

        Raises:
            UserError: what the worker raised, or it was killed.
            RuntimeError: a defect, with the worker's traceback.
        """
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise UserError(self._death()) from None
        if kind == "mistake":
            raise UserError(value)
        if kind == "defect":
            raise RuntimeError(f"in a worker:\n{value}")
        on_bytes(value)
        return bool(kind == "done")

    def _death(self) -> str:
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        why = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return (
            f"a worker {how}{why} in unit {self.unit}; give the same command again (with fewer --workers where memory "
            "is short): it goes on from the finished parts"
        )


@contextlib.contextmanager
def _started(folder: Path, count: int) -> Iterator[list[_Worker]]:
    # Not forked: threads of libraries that are loaded here would be copied in the middle of what they do.
    context = multiprocessing.get_context("spawn")
    pool: list[_Worker] = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(folder, theirs), daemon=True)
            process.start()
            theirs.close()  # so that its end is seen when the worker ends
            pool.append(_Worker(process, ours))
        yield pool
    finally:
        for worker in pool:
            worker.connection.close()  # an idle worker ends by that
            if worker.unit is not None:
                worker.process.terminate()
        for worker in pool:
            worker.process.join()


def _work(folder: Path, connection: Connection) -> None:
    """A worker's life: units come and answers go, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends its workers
    try:
        job = Job.load(folder)
        while True:
            unit = connection.recv()
            teller = _Teller(connection)
            run_unit(job, unit, teller)
            connection.send(("done", teller.num_bytes))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        answer = "mistake", str(error)
    except Exception:
        answer = "defect", traceback.format_exc()
    with contextlib.suppress(OSError):
        connection.send(answer)


class _Teller:
    """Sums up the bytes that have been read and tells them now and then."""

    def __init__(self, connection: Connection) -> None:
        self.num_bytes = 0
        self._connection = connection
        self._told = time.monotonic()

    def __call__(self, count: int) -> None:
        self.num_bytes += count
        now = time.monotonic()
        if now - self._told > _TELL_SECONDS:
            self._connection.send(("bytes", self.num_bytes))
            self.num_bytes, self._told = 0, now
