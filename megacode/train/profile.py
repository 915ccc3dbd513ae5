"""Traces of chosen steps by torch's profiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megacode.parallel.heartbeat import doing
from megacode.recipe import Recipe


@contextmanager
def profiled(recipe: Recipe, rank: int, step: int) -> Iterator[None]:
    """Write RUN/profile/step_STEP_rank_RANK.json.gz of what happens within, for chrome://tracing or Perfetto."""
    folder = Path(recipe.run) / "profile"
    folder.mkdir(exist_ok=True)
    with torch.profiler.profile(record_shapes=True, profile_memory=True) as profiler:
        yield
    doing("writing a profile", patient=True)
    profiler.export_chrome_trace(str(folder / f"step_{step:08d}_rank_{rank:05d}.json.gz"))
