"""What ranks do in the doctor's tests, beside what they do in the doctor."""

import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch.distributed as dist

from support.training import WITHOUT


def without(cure: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call the function with a cure of the engine left out."""
    with mock.patch(*WITHOUT[cure]()):
        return function(*args)


def add(some: int, other: int) -> tuple[int, int, int]:
    return dist.get_rank(), dist.get_world_size(), some + other


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)
    dist.barrier()


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ZeroDivisionError("a mistake")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.write(2, b"last words\n")
        os._exit(7)
    dist.barrier()
