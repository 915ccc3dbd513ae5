"""Live tensor bytes of a rank of our own engine at the peak of a step."""

from __future__ import annotations

from megacode.recipe import Recipe
from megacode.tools.bench import memory
from support.traffic import own_mesh


def live_bytes(config: Recipe) -> int:
    """This rank's."""
    return memory.live_bytes(config, own_mesh(config))
