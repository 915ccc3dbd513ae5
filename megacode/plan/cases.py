"""The layouts that a recipe is verified in: read, shrunk where asked for, and refused before anything starts; pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from megacode.engine.config import deepspeed_config
from megacode.errors import UserError
from megacode.plan.layout import Layout, fit
from megacode.plan.scale import shrink
from megacode.plan.words import LayoutWords, parse
from megacode.recipe import ModelSection, Recipe


@dataclass(frozen=True)
class Case:
    """A recipe in a layout."""

    words: LayoutWords
    recipe: Recipe
    layout: Layout


def cases(recipe: Recipe, texts: Sequence[str], factor: float = 1.0) -> tuple[Recipe, list[Case]]:
    """The recipe with its model shrunk `factor` times, and that in each layout.

    Raises:
        UserError: a layout is misspelt, or the recipe refuses it; names the layout and the mend.
    """
    wanted = [parse(text) for text in texts]
    for text, words in zip(texts, wanted, strict=True):
        if isinstance(words.parallel.stages, str) or factor == 1:  # by hand, they are those of the shrunk model
            _fit(recipe, words, f'--layout "{text}"')
    small = shrunk(recipe, factor, wanted)
    at = f" at --scale {factor:g}" if factor > 1 else ""
    found = []
    for text, words in zip(texts, wanted, strict=True):
        found.append(Case(words, words.of(small), _fit(small, words, f'--layout "{text}"{at}')))
    return small, found


def shrunk(recipe: Recipe, factor: float, layouts: Sequence[LayoutWords]) -> Recipe:
    """The recipe with a model `factor` times smaller that the layouts can share; it starts at random."""
    if factor == 1:
        return recipe
    changes = shrink(recipe.model, factor, [words.parallel for words in layouts])
    model = ModelSection.model_validate({**recipe.model.model_dump(), **changes})
    checkpoint = recipe.checkpoint.model_copy(update={"start_from": None})
    return recipe.model_copy(update={"model": model, "checkpoint": checkpoint})


def _fit(recipe: Recipe, words: LayoutWords, where: str) -> Layout:
    try:
        changed = words.of(recipe)
        deepspeed_config(changed)
        return fit(changed, words.world_size)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
