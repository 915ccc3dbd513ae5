"""Clusters shared by all tests of a session."""

from collections.abc import Callable, Iterator

import pytest
from support.slurm import SlurmCluster, unavailable


@pytest.fixture(scope="session")
def clusters() -> Iterator[Callable[..., SlurmCluster]]:
    """`clusters(nodes, cpus, gpus)`: a running cluster, one of each shape a session; where it cannot be, a skip."""
    alive: dict[tuple[int, int, int], SlurmCluster] = {}

    def cluster(nodes: int = 2, cpus: int = 2, gpus: int = 0) -> SlurmCluster:
        if reason := unavailable(gpus):
            pytest.skip(reason)
        shape = (nodes, cpus, gpus)
        if shape not in alive:
            alive[shape] = SlurmCluster(*shape).__enter__()
        return alive[shape]

    yield cluster
    for one in alive.values():
        one.__exit__()
