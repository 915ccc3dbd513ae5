"""Warm worlds, shared by all tests of a session."""

import gc
import os

# One thread for each process, as long as nobody says otherwise: threads that wait for one another on cores which other
# processes have are hundreds of times slower than one. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from support.world import World

gc.disable()  # while the tests are imported, and torch with them
settings.register_profile("busy", deadline=None)  # the machine may be busy
settings.load_profile("busy")


def pytest_collection_finish() -> None:
    """What is imported stays: no collection need look at it, of which pytest makes five at its end."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[[int], World]]:
    """`worlds(n)`: the session's world of n processes, started once; waiting, they cost memory only."""
    alive: dict[int, World] = {}
    yield lambda size: alive.setdefault(size, World(size))
    for world in alive.values():
        world.stop()
