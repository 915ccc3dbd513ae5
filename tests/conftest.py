"""Warm worlds, shared by all tests of a session."""

from collections.abc import Callable, Iterator

import pytest
from support.world import World


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[[int], World]]:
    """`worlds(n)`: the session's world of n processes, started once; waiting, they cost memory only."""
    alive: dict[int, World] = {}
    yield lambda size: alive.setdefault(size, World(size))
    for world in alive.values():
        world.stop()
