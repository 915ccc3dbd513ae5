"""Traces of chosen steps by torch's profiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megacode.errors import UserError
from megacode.parallel.heartbeat import doing
from megacode.recipe import Recipe


def check_profile(recipe: Recipe, world_size: int) -> None:
    """Refuse traces that the run can't write.

    Raises:
        UserError: names the key.
    """
    logging, steps = recipe.logging, recipe.schedule.steps
    if not logging.profile_steps:
        return
    if not logging.profile_ranks:
        raise UserError("logging.profile_ranks is empty and logging.profile_steps is not; name ranks")
    for step in logging.profile_steps:
        if not 1 <= step <= steps:
            raise UserError(f"logging.profile_steps: no step {step}; schedule.steps is {steps}, name 1 to {steps}")
    for rank in logging.profile_ranks:
        if not 0 <= rank < world_size:
            raise UserError(f"logging.profile_ranks: no rank {rank}; name 0 to {world_size - 1}")


@contextmanager
def profiled(recipe: Recipe, rank: int, step: int) -> Iterator[None]:
    """Write RUN/profile/step_STEP_rank_RANK.json.gz of what happens within, for chrome://tracing or Perfetto."""
    folder = Path(recipe.run) / "profile"
    folder.mkdir(exist_ok=True)
    with torch.profiler.profile(record_shapes=True, profile_memory=True) as profiler:
        yield
    doing("writing a profile", patient=True)
    profiler.export_chrome_trace(str(folder / f"step_{step:08d}_rank_{rank:05d}.json.gz"))
