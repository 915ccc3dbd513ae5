"""Processes of the doctor's own that form a world, run collective functions, and explain themselves when they hang.

Each function has a time limit. A rank that raises, dies or does not answer ends the world: nothing is left behind.
"""

import faulthandler
import multiprocessing
import os
import pickle
import re
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megacode.doctor.versions import one_line
from megacode.errors import UserError
from megacode.importing import uncollected

LINES = 4
"""How much of a stack, or of what a dead rank wrote last, is shown."""
FRAME = re.compile(r'File "(?:.*/site-packages/)?(.*)", line (\d+) in (.*)')
"""A line of faulthandler."""


class RanksError(Exception):
    """Ranks raised, died or did not answer; the message says which, and where they stood."""


class Processes:
    """`size` ranks on this machine, started at the first `run` and after a failure; a context manager that ends them.

    Args:
        size: number of ranks.
        cuda: a GPU and NCCL for each, else the CPU and gloo.
        timeout_seconds: of a collective, and of starting. A function gets twice that, since ranks that wait for a
            silent one raise after the first half.
    """

    def __init__(self, size: int, cuda: bool, timeout_seconds: float = 60) -> None:
        self.size, self.cuda, self.timeout_seconds = size, cuda, timeout_seconds
        self.ranks: list[tuple[Any, Connection]] = []

    def __enter__(self) -> "Processes":
        self.folder = tempfile.TemporaryDirectory(prefix="megacode-doctor-")
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        self.folder.cleanup()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a module's function on every rank; results in rank order.

        Raises:
            RanksError: not every rank returned.
        """
        if not self.ranks:
            self._start()
            self._call(os.getpid)  # all have started: from here on time is the function's
        return self._call(function, *args)

    def _call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        started = time.monotonic()
        for _, pipe in self.ranks:
            pipe.send((function, args))
        results, errors = self._collect(started)
        if len(results) == self.size:
            return [results[rank] for rank in range(self.size)]
        silent = [rank for rank in range(self.size) if rank not in results and rank not in errors]
        # Whoever fails early fails by itself and the others wait for it; later, they failed waiting for the silent.
        crashed = time.monotonic() - started < self.timeout_seconds
        lines = [] if crashed else [f"rank {rank} does not answer{self._stack(rank)}" for rank in silent]
        self._end()
        # The first to fail has the reason; a dead one before those that lost their connection to it.
        dead = [rank for rank in errors if errors[rank].startswith("ended")]
        lines += [f"rank {rank} {errors[rank]}" for rank in [*dead, *errors][:1]]
        raise RanksError("\n".join(lines))

    def _collect(self, started: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Results, and the errors of ranks that raised or died, until all answered, one crashed, or time is over."""
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = started + 2 * self.timeout_seconds
        pipes: dict[Any, int] = {pipe: rank for rank, (_, pipe) in enumerate(self.ranks)}
        while pipes and (left_seconds := deadline - time.monotonic()) > 0:
            for pipe in wait(list(pipes), left_seconds):
                rank = pipes.pop(pipe)
                try:
                    right, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    right, value = False, self._death(rank)
                if right:
                    results[rank] = value
                else:
                    errors[rank] = value
            if errors:  # the others' errors follow from the first one: those that come at once are told, none awaited
                crashed = time.monotonic() - started < self.timeout_seconds
                deadline = min(deadline, time.monotonic() + (0.5 if crashed else 5))
        return results, errors

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.size):
            environment = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(self.size),
                "LOCAL_WORLD_SIZE": str(self.size),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
            }
            if not self.cuda:
                environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
            here, there = context.Pipe()
            arguments = (there, environment, self._log(rank), self.timeout_seconds)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.ranks.append((process, here))

    def _log(self, rank: int) -> Path:
        return Path(self.folder.name) / f"rank{rank}.log"

    def _stack(self, rank: int) -> str:
        """Where a silent rank stands: its innermost frames, which it writes to its log on SIGUSR1."""
        process, _ = self.ranks[rank]
        log = self._log(rank)
        before = log.stat().st_size if log.is_file() else 0
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        text = log.read_bytes()[before:].decode(errors="replace") if log.is_file() else ""
        frames = [f"{path}:{line} in {name}" for path, line, name in FRAME.findall(text)][:LINES]
        return "\n" + _indent(frames) if frames else ", nor to a signal: it is stopped, or deep in the system"

    def _death(self, rank: int) -> str:
        process, _ = self.ranks[rank]
        process.join(5)
        log = self._log(rank)
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        return f"ended with exit code {process.exitcode}\n{_indent(text.strip().splitlines()[-LINES:])}"

    def _end(self) -> None:
        for process, pipe in self.ranks:
            pipe.close()
            process.kill()
        for process, _ in self.ranks:
            process.join()
        self.ranks = []


def _indent(lines: list[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def _explain(error: BaseException) -> str:
    """What was raised and where, innermost first."""
    if isinstance(error, UserError):
        return f"refused: {error}"
    stack = reversed(traceback.extract_tb(error.__traceback__))
    frames = [f"{frame.filename.rpartition('/site-packages/')[2]}:{frame.lineno} in {frame.name}" for frame in stack]
    return f"raised {one_line(error, limit=300)}\n{_indent(frames[:LINES])}"


def _serve(pipe: Connection, environment: dict[str, str], log: Path, timeout_seconds: float) -> None:
    """A rank's life: all that it and its libraries print goes to its log."""
    os.environ.update(environment)
    file = log.open("w", encoding="utf-8")
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
    # Should the doctor itself be killed: nobody reads an answer then, and nobody may stay.
    faulthandler.dump_traceback_later(4 * timeout_seconds, exit=True, file=file)
    failure = None
    try:
        with uncollected():
            from megacode.train.launch import find_device, find_place, start_process_group

        place = find_place()
        start_process_group(place, find_device(place), timeout_seconds)
    except Exception as error:
        failure = _explain(error)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        faulthandler.dump_traceback_later(4 * timeout_seconds, exit=True, file=file)
        answer = (False, f"did not start: {failure}") if failure else _answer(function, args)
        pipe.send_bytes(pickle.dumps(answer))
        faulthandler.cancel_dump_traceback_later()


def _answer(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, function(*args)
    except Exception as error:
        return False, _explain(error)
