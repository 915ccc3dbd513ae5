"""How fast the ranks talk: figures without a verdict, since what is right depends on the machine."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist

from megacode.doctor.finding import Finding
from megacode.doctor.layouts import Run
from megacode.train.launch import find_device, find_place

MIB = 2**20
SIZES_BYTES = {"cpu": (MIB, 16 * MIB), "cuda": (MIB, 16 * MIB, 256 * MIB)}
WARM_UP, REPEATS = 2, 5


@dataclass(frozen=True)
class Speed:
    """One measurement."""

    operation: str
    size_bytes: int
    """Of the whole tensor: what is reduced, what has been gathered, what is sent."""
    bytes_per_second: float
    """all-reduce and all-gather: bus bandwidth, which does not depend on the number of ranks; else of the transfer."""


def bus_bytes(operation: str, size_bytes: int, num_ranks: int) -> float:
    """Bytes that an ideal ring moves over each rank's link (NCCL's tests, doc/PERFORMANCE.md).

    all-reduce: 2 (n - 1) / n of the tensor; all-gather: (n - 1) / n of what has been gathered; a transfer: all of it.
    """
    share = {"all-reduce": 2 * (num_ranks - 1) / num_ranks, "all-gather": (num_ranks - 1) / num_ranks}
    return size_bytes * share.get(operation, 1.0)


def check_links(run: Run, num_processes: int) -> Iterator[Finding]:
    """Bandwidths in GB/s (1e9 bytes a second)."""
    speeds: list[Speed] = run(measure)[0]
    for operation in ("all-reduce", "all-gather"):
        figures = [f"{_size(s)} {_gigabytes(s)}" for s in speeds if s.operation == operation]
        yield Finding(operation, "ok", f"bus bandwidth {', '.join(figures)}")
    transfers = [speed for speed in speeds if "->" in speed.operation]
    figures = []
    for size_bytes in sorted({speed.size_bytes for speed in transfers}):
        one_size = sorted((s for s in transfers if s.size_bytes == size_bytes), key=lambda s: s.bytes_per_second)
        slow, fast = one_size[0], one_size[-1]
        figures.append(f"{_size(slow)} {_gigabytes(slow)} ({slow.operation}) to {_gigabytes(fast)} ({fast.operation})")
    yield Finding("send and receive", "ok", "\n".join(figures))


def measure() -> list[Speed]:
    """Time the operations on this world's ranks. Collective; the same list on every rank."""
    device, num_ranks, rank = find_device(find_place()), dist.get_world_size(), dist.get_rank()
    speeds = []

    for asked_bytes in SIZES_BYTES[device.type]:
        part = torch.zeros(-(-asked_bytes // (4 * num_ranks)), device=device)
        whole = torch.zeros(part.numel() * num_ranks, device=device)
        calls: dict[str, Callable[[], object]] = {
            "all-reduce": partial(dist.all_reduce, whole),
            "all-gather": partial(dist.all_gather_into_tensor, whole, part),
        }
        calls |= {f"{a}->{b}": partial(_transfer, whole, rank, a, b) for a, b in pairwise(range(num_ranks))}
        for operation, call in calls.items():
            moved_bytes = bus_bytes(operation, 4 * whole.numel(), num_ranks)
            speeds.append(Speed(operation, asked_bytes, moved_bytes / _seconds(call, device)))
    return speeds


def _transfer(tensor: torch.Tensor, rank: int, source: int, target: int) -> None:
    if rank == source:
        dist.send(tensor, target)
    elif rank == target:
        dist.recv(tensor, source)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Mean time of a call on the slowest rank; the first calls open connections."""
    for _ in range(WARM_UP):
        call()
    _wait(device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = torch.tensor(time.perf_counter() - started, device=device)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed) / REPEATS


def _wait(device: torch.device) -> None:
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _size(speed: Speed) -> str:
    return f"{speed.size_bytes // MIB} MiB:"


def _gigabytes(speed: Speed) -> str:
    return f"{speed.bytes_per_second / 1e9:.2f} GB/s"
