"""A warm group of gloo processes that runs case after case."""

import faulthandler
import importlib
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

from support.forking import ENVIRONMENT, forking


class CaseError(AssertionError):
    """A rank raised, or did not answer in time."""


class World:
    """`size` processes that are the ranks of one torch.distributed world."""

    def __init__(self, size: int, timeout_seconds: float = 120) -> None:
        self.size, self.timeout_seconds = size, timeout_seconds
        self.workers: list[tuple[Any, Any]] = []

    def start(self) -> None:
        context = forking()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.size):
            here, there = context.Pipe()
            environment = {
                **ENVIRONMENT,
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.size),
            }
            process = context.Process(target=_worker, args=(there, environment, self.timeout_seconds), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))

    def run(self, case: Callable[..., Any], *args: Any, timeout_seconds: float | None = None) -> list[Any]:
        """Call `case(*args)` on every rank; results in rank order. A failure ends the world; it starts again."""
        if not self.workers:
            self.start()
        for _, pipe in self.workers:
            pipe.send((case.__module__, case.__qualname__, args))
        deadline = time.monotonic() + (timeout_seconds or self.timeout_seconds)
        results: list[Any] = [None] * self.size
        errors = []
        waiting = set(range(self.size))
        while waiting and time.monotonic() < deadline and not errors:
            for rank in sorted(waiting):
                _, pipe = self.workers[rank]
                if not pipe.poll(0.002):
                    continue
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "the process ended"
                waiting.discard(rank)
                if ok:
                    results[rank] = value
                else:
                    errors.append(f"rank {rank}:\n{value}")
        if waiting and not errors:
            errors.append(f"ranks {sorted(waiting)} did not answer")
        if errors:
            self.stop()
            raise CaseError("\n".join(errors))
        return results

    def stop(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers = []


def _worker(pipe: Any, environment: dict[str, str], timeout_seconds: float) -> None:
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:
            os._exit(0)
        faulthandler.dump_traceback_later(timeout_seconds, exit=True)
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
