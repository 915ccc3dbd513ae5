"""Ranks of a run without a launcher, forked with the libraries imported; one may stop at a definite place."""

import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.forking import forking

ROOT = Path(__file__).parents[2]
_LOCK = threading.Lock()
"""A start asks for the exit codes of all processes that there are; two threads must not ask at once."""


@dataclass
class Ended:
    """What is left of a run."""

    codes: list[int | None]
    """Exit code of each rank; None: it had to be killed."""
    output: str
    seconds: float


def run_ranks(
    recipe: Path, *overrides: str, trap: Callable[[], None] | None = None, trapped: int = 0, world_size: int = 4,
    absent: tuple[int, ...] = (), timeout_seconds: float = 160, own: dict[int, tuple[str, ...]] | None = None,
) -> Ended:  # fmt: skip
    """Run `launchers/train.py` on each rank, without a launcher that would end the others.

    Args:
        recipe: its file.
        overrides: of the recipe.
        trap: called on the rank `trapped` before it starts.
        trapped: see there.
        world_size: processes.
        absent: ranks that are not started.
        timeout_seconds: after which all are killed.
        own: rank -> more overrides.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = recipe.parent / f"output_{port}.txt"
    processes = {}
    for rank in sorted(set(range(world_size)) - set(absent)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        environment = {name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()}
        arguments = [str(recipe), *overrides, *(own or {}).get(rank, ())]
        mine = trap if rank == trapped else None
        processes[rank] = forking().Process(
            target=_rank, args=(environment, arguments, str(log), timeout_seconds, mine)
        )
        with _LOCK:
            processes[rank].start()
    began = time.monotonic()
    codes: list[int | None] = [None] * world_size
    while processes and time.monotonic() < began + timeout_seconds:
        time.sleep(0.05)
        with _LOCK:
            codes = [processes[rank].exitcode if rank in processes else None for rank in range(world_size)]
        if all(codes[rank] is not None for rank in processes):
            break
    for process in processes.values():
        if process.exitcode is None:
            process.kill()
        process.join()
    return Ended(codes, log.read_text(errors="replace"), time.monotonic() - began)


def _rank(
    environment: dict[str, str], arguments: list[str], log: str, timeout_seconds: float,
    trap: Callable[[], None] | None,
) -> None:  # fmt: skip
    os.environ.update(environment)
    os.chdir(ROOT)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.dump_traceback_later(timeout_seconds - 5, exit=True)
    import sys

    from megacode.train.main import main

    sys.argv = ["launchers/train.py", *arguments]
    if trap is not None:
        trap()
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def stop_here() -> None:
    """As a debugger or a scheduler stops a process."""
    os.kill(os.getpid(), signal.SIGSTOP)


def at_call(owner: Any, name: str, number: int, action: Callable[[], None], when: Callable[..., bool] | None = None):
    """Do something at the `number`-th call (from 1) of owner.name, or of its calls with arguments that `when` likes."""
    original, calls = getattr(owner, name), 0

    def trapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += when is None or bool(when(*args, **kwargs))
        if calls == number:
            calls += 1
            action()
        return original(*args, **kwargs)

    setattr(owner, name, trapped)
