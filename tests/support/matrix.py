"""Many layouts in few warm processes: what a table of layouts is tested by."""

from collections.abc import Callable

from megacode.doctor.outcome import compare
from megacode.doctor.probe import reference, train
from megacode.doctor.verify import problems
from megacode.plan.cases import cases
from megacode.recipe import Recipe
from support.world import World


def wrong(worlds: Callable[[int], World], words: str, config: Recipe, steps: int = 2) -> list[str]:
    """What is wrong with a layout of a recipe, on random tokens, against one process: a line each.

    A world is started once a size, a mesh made once a world and layout, and one process trains once a recipe; what the
    recipe says of layout and precision does not matter, the words do.
    """
    _, (case,) = cases(config, [words])
    ranks = worlds(case.layout.world_size).run(train, case.recipe, steps)
    expected = reference(case.recipe, steps)
    return problems(ranks, compare(ranks, expected), expected, case.recipe.precision)
