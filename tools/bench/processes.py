"""The processes of one contestant: started once, then told to train so many steps, whenever it is their turn."""

from __future__ import annotations

import faulthandler
import functools
import logging
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import typer

from megacode.errors import UserError
from megacode.recipe import Recipe
from megacode.tools.bench.contest import Step, step_batches

ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "TOKENIZERS_PARALLELISM": "false"}
DEVICE_ENVIRONMENT = {
    "cpu": {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # while importing; each rank sets its own number
    },
    "cuda": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
}


Span = tuple[float, float]
"""When a rank began and ended a step, on the machine's clock; seconds."""

Figures = tuple[float, float, float]
"""Median, lowest and highest of what was measured."""


def command_line(main: Callable[..., None]) -> NoReturn:
    """Run a benchmark by its command line; exit code 2 for a mistake of the user, 1 for a failure, a line each."""
    try:
        typer.run(main)
    except (UserError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    sys.exit(0)


def figures_of(values: Sequence[float]) -> Figures:
    """Of all steps but the first, which is the warm-up."""
    return median(values[1:]), min(values[1:]), max(values[1:])


def step_seconds(spans: Iterable[Span]) -> float:
    """From the first rank's start of a step to the last one's end."""
    begun, ended = zip(*spans, strict=True)
    return float(max(ended) - min(begun))


@dataclass(frozen=True)
class Turn:
    """Steps that a contestant trained, one after the other."""

    losses: list[float]
    """Mean loss over the ranks, each step."""
    seconds: list[float]
    """Of the slowest rank, each step."""


@dataclass(frozen=True)
class Memory:
    """Resident bytes of the rank with the highest peak."""

    before: int
    """Peak before the model was built: the interpreter, its libraries, the process group."""
    peak: int
    """Peak of the whole life (VmHWM)."""


Serve = Callable[..., Callable[[str, int], Any]]
"""Arguments -> what answers (request, count)."""


PRELOADED = ["torch.distributed.fsdp", "deepspeed", "transformers.models.llama.modeling_llama"]
"""Imported once, and there in all processes: memory before the model is the same for all contestants."""


@functools.cache
def _context(device: str) -> Any:
    """For the CPU a server that has the libraries imported and forks the ranks: each would else take seconds to start.

    CUDA does not stand a fork.
    """
    os.environ.update(ENVIRONMENT | DEVICE_ENVIRONMENT[device])
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Team:
    """The processes that run a contestant, one a rank; they wait, without using a core, for their turn."""

    def __init__(
        self, serve: Serve, arguments: tuple[Any, ...], processes: int, threads: int, timeout_seconds: float,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        """`serve(*arguments)` runs on every rank, in a process group of gloo, or of NCCL where the device is cuda; what
        it returns answers requests."""
        self.timeout_seconds = timeout_seconds
        self.workers: list[tuple[Any, Any]] = []
        context = _context(device)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(processes):
            here, there = context.Pipe()
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_SIZE": processes}
            places["MASTER_PORT"] = port
            environment = {key: str(value) for key, value in places.items()}
            inherited = (there, environment, device, threads, timeout_seconds, serve, arguments)
            process = context.Process(target=_worker, args=inherited, daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))
        self._answers()

    def train(self, steps: int) -> Turn:
        """Train so many more steps."""
        ranks = self.ask("train", steps)
        losses = [sum(values) / len(ranks) for values in zip(*(rank[0] for rank in ranks), strict=True)]
        return Turn(losses, [max(values) for values in zip(*(rank[1] for rank in ranks), strict=True)])

    def memory(self) -> Memory:
        """Of the rank with the highest peak."""
        return max(self.ask("memory", 0), key=lambda memory: memory.peak)

    def stop(self) -> None:
        """End the processes."""
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers = []

    def ask(self, request: str, count: int) -> list[Any]:
        """Every rank's answer to a request."""
        for _, pipe in self.workers:
            pipe.send((request, count))
        return self._answers()

    def _answers(self) -> list[Any]:
        """What every rank answers; if one fails or is late, all end and a RuntimeError says why."""
        deadline = time.monotonic() + self.timeout_seconds
        answers: dict[int, Any] = {}
        while len(answers) < len(self.workers):
            for rank, (process, pipe) in enumerate(self.workers):
                if rank in answers:
                    continue
                if pipe.poll(0.02):
                    answers[rank] = _received(pipe)
                elif not process.is_alive():
                    answers[rank] = RuntimeError("the process ended")
                elif time.monotonic() > deadline:
                    answers[rank] = RuntimeError(f"no answer within {self.timeout_seconds:.0f} s")
                if isinstance(answers.get(rank), Exception):
                    self.stop()
                    raise RuntimeError(f"rank {rank}: {answers[rank]}")
        return [answers[rank] for rank in sorted(answers)]


def _received(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return RuntimeError("the process ended")


def resident_peak() -> int:
    """VmHWM of this process, bytes: the most that was ever resident."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux tells VmHWM")


def _worker(
    pipe: Any,
    environment: dict[str, str],
    device: str,
    threads: int,
    timeout_seconds: float,
    serve: Serve,
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    os.dup2(2, 1)  # standard output is the parent's table
    faulthandler.dump_traceback_later(timeout_seconds, exit=True)
    try:
        _start(threads, device)
        answer = serve(*arguments)
        pipe.send(None)
        while True:
            faulthandler.cancel_dump_traceback_later()
            request = pipe.recv()
            faulthandler.dump_traceback_later(timeout_seconds, exit=True)
            pipe.send(answer(*request))
    except EOFError:
        os._exit(0)
    except BaseException:
        pipe.send(RuntimeError(traceback.format_exc()))
        os._exit(1)


def _start(threads: int, device: str) -> None:
    """Join the process group."""
    import torch
    import torch.distributed as dist

    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    if device == "cuda":
        mine = torch.device(device, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(mine)
        dist.init_process_group("nccl", device_id=mine)
    else:
        dist.init_process_group("gloo")


def contestant(builder: Callable[[Recipe], Step], recipe: Recipe) -> Callable[[str, int], Any]:
    """What a rank of a contestant serves: "train" so many steps, "memory"."""
    import torch.distributed as dist

    rank, processes = dist.get_rank(), dist.get_world_size()
    before = resident_peak()
    step = builder(recipe)
    done = 0

    def train(count: int) -> tuple[list[float], list[float]]:
        nonlocal done
        losses, seconds = [], []
        for number in range(done, done + count):
            batches = step_batches(recipe, number, rank, processes)
            started = time.perf_counter()
            losses.append(step(batches))
            seconds.append(time.perf_counter() - started)
        done += count
        return losses, seconds

    return lambda request, count: train(count) if request == "train" else Memory(before, resident_peak())
