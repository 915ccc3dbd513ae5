"""What the schedule and the engine cost per micro-batch, beyond the model's own forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from megacode.recipe import Recipe
from megacode.tools.bench.contest import contest_recipe, initial_weights, step_batches
from megacode.tools.bench.ours import micro_batch

NUM_MICRO_BATCHES = 16
LAYOUTS: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"zero": 1},
    "ZeRO-3, gather step, reduce step": {"zero": 3, "gather": "step", "reduce": "step"},
    "ZeRO-3, gather step, reduce microbatch": {"zero": 3, "gather": "step", "reduce": "microbatch"},
    "ZeRO-3, gather microbatch, reduce microbatch": {"zero": 3, "gather": "microbatch", "reduce": "microbatch"},
}


def overheads(repetitions: int) -> dict[str, float]:
    """CPU milliseconds per micro-batch of the schedule alone and of each layout, median of `repetitions`; one process.

    A repetition times, one after the other, M micro-batches of the nano model as (a) a plain loop of forward and
    backward, (b) the same module under `Pipeline` without an engine, (c) `ZeroEngine.train_step` in each layout. The
    schedule costs (b - a) / M, a layout (c - a) / M; both of the same repetition. The update is not in it. With one
    process nothing is sent; what ZeRO copies of gradients and parameters within the process does count. Seconds are the
    process's own CPU time, one thread: nothing waits here, and other work on the machine does not count.
    """
    plain, schedule = _without_engine()
    runs = {"plain": plain, "schedule alone": schedule, **{name: _engine(LAYOUTS[name]) for name in LAYOUTS}}
    for run in runs.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            seconds[name].append(run())
    return {
        name: 1000 * median(own - bare for own, bare in zip(seconds[name], seconds["plain"], strict=True))
        / NUM_MICRO_BATCHES
        for name in runs if name != "plain"
    }  # fmt: skip


def serve() -> Callable[[str, int], Any]:
    """What the process serves: the overheads of so many repetitions."""
    return lambda request, repetitions: overheads(repetitions)


def _recipe(parallel: dict[str, Any]) -> Recipe:
    return contest_recipe("nano", NUM_MICRO_BATCHES, parallel, 1)


def _without_engine() -> tuple[Callable[[], float], Callable[[], float]]:
    """The plain loop and the schedule alone, over one module; each returns its seconds."""
    import torch

    from megacode.model.llama import Llama, initialise
    from megacode.parallel.mesh import build_mesh
    from megacode.parallel.pipeline import Pipeline

    recipe = _recipe({})
    model = initialise(Llama(recipe.model), recipe.seed)
    batches = [micro_batch(*batch) for batch in step_batches(recipe, 0, 0, 1)]
    pipeline = Pipeline(build_mesh(1, 1, 1), 1, recipe.model.hidden, torch.float32, torch.device("cpu"))

    def timed(run: Callable[[], object]) -> float:
        model.zero_grad()
        started = time.process_time()
        run()
        return time.process_time() - started

    def plain() -> None:
        for batch in batches:
            model(batch.tokens, batch.positions, None, batch.labels).sum().backward()

    def schedule() -> None:
        pipeline.train(
            batches,
            1.0,
            lambda chunk, x, batch, last: model(x, batch.positions, None, batch.labels),
            lambda scalar, last: scalar.backward(),
        )

    return lambda: timed(plain), lambda: timed(schedule)


def _engine(parallel: dict[str, Any]) -> Callable[[], float]:
    """The engine in a layout; returns the seconds of `train_step`, not of the update that follows."""
    import torch

    from megacode.engine.zero import ZeroEngine, start_deepspeed
    from megacode.parallel.mesh import build_mesh
    from megacode.plan.layout import fit

    start_deepspeed()
    recipe = _recipe(parallel)
    zero = ZeroEngine(recipe, fit(recipe, 1), build_mesh(1, 1, 1), torch.device("cpu"))
    for name, value, _ in initial_weights(recipe):
        zero.write(name, value)
    batches = [micro_batch(*batch) for batch in step_batches(recipe, 0, 0, 1)]

    def run() -> float:
        started = time.process_time()
        zero.train_step(batches, 1e-4)
        seconds = time.process_time() - started
        zero.update(recipe.optimizer.learning_rate)
        return seconds

    return run
