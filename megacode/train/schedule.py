"""The learning rate of a step: pure."""

import math

from megacode.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of step `step` (0 is the first): linear warm-up to the peak, then a cosine to peak * final_ratio.

    Step warmup_steps - 1 (or 0) is the first at the peak, the last step is at the end of the cosine.
    """
    peak, schedule = recipe.optimizer.learning_rate, recipe.schedule
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    decay_steps = max(schedule.steps - 1 - max(schedule.warmup_steps - 1, 0), 1)
    share = min((step - max(schedule.warmup_steps - 1, 0)) / decay_steps, 1.0)
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * 0.5 * (1 + math.cos(math.pi * share)))
