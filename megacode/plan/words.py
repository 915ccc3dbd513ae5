"""A layout in words: "tp2 pp2 dp2 zero3 gather=microbatch". Read, written, and put into a recipe; pure.

A word left out means what the key left out of a recipe means: 1, off, zero1. So the same words are the same layout
whatever recipe they are put into.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from megacode.errors import UserError
from megacode.plan.search import sibling
from megacode.recipe import ParallelSection, Recipe

COUNTS = {"tp": "tensor", "pp": "pipeline", "dp": "data", "cp": "context", "v": "virtual_stages"}
"""Word, with a number behind it -> key of the recipe's `parallel`; `data` is no key: what the processes leave over."""
CHOICES = {
    "gather": ("step", "microbatch"),
    "reduce": ("step", "microbatch"),
    "recompute": ("none", "selective", "full"),
    "stages": ("even", "weighed"),
}
"""Word, with a value behind it -> its values; stages may also be numbers of layers."""
PRECISIONS = ("fp32", "bf16")
KNOWN = (
    "tpN ppN dpN cpN vN zero1|2|3 sp gather=step|microbatch reduce=step|microbatch recompute=none|selective|full "
    "stages=weighed|1,2,1 bf16|fp32"
)
"""All words, for messages and --help."""


@dataclass(frozen=True)
class LayoutWords:
    """What a layout says of a recipe, and how many data ranks it has."""

    parallel: ParallelSection
    data: int = 1
    precision: Literal["bf16", "fp32"] = "fp32"

    @property
    def world_size(self) -> int:
        """Number of processes: the product of the axes."""
        return self.parallel.tensor * self.parallel.pipeline * self.parallel.context * self.data

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe in this layout and precision.

        Another ZeRO stage than the recipe's takes the DeepSpeed file of that stage beside the recipe's, or none.
        """
        file = recipe.deepspeed_config
        if file is not None and self.parallel.zero != recipe.parallel.zero:
            file = sibling(file, f"zero{self.parallel.zero}.json")
        update = {"parallel": self.parallel, "precision": self.precision, "deepspeed_config": file}
        return recipe.model_copy(update=update)

    def __str__(self) -> str:
        """The words that `parse` reads back to an equal layout."""
        parallel = self.parallel
        sizes = {key: getattr(parallel, key) for key in COUNTS.values() if key != "data"} | {"data": self.data}
        words = [f"{word}{sizes[key]}" for word, key in COUNTS.items() if sizes[key] > 1]
        words += [f"zero{parallel.zero}", *["sp"] * parallel.sequence]
        for word in CHOICES:
            value = getattr(parallel, word)
            if value != ParallelSection.model_fields[word].default:
                words.append(f"{word}={','.join(map(str, value)) if isinstance(value, list) else value}")
        return " ".join([*words, *[self.precision] * (self.precision != "fp32")])


def parse(text: str) -> LayoutWords:
    """Read a layout: words in any order, between spaces.

    Raises:
        UserError: a word is unknown or says again what another has said, or the words contradict each other.
    """
    values: dict[str, Any] = {}
    said: dict[str, str] = {}
    for word in text.split():
        key, value = _read(text, word)
        if key in said:
            raise UserError(f'--layout "{text}": {said[key]} and {word} both say {key}; leave one out')
        said[key], values[key] = word, value
    data, precision = values.pop("data", 1), values.pop("precision", "fp32")
    try:
        return LayoutWords(ParallelSection.model_validate(values), data, precision)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f'--layout "{text}": {reason}') from None


def _read(text: str, word: str) -> tuple[str, Any]:
    """(key of `parallel`, data or precision; value) of a word."""
    if word in PRECISIONS:
        return "precision", word
    if word == "sp":
        return "sequence", True
    if match := re.fullmatch(r"zero([123])", word):
        return "zero", int(match[1])
    if (match := re.fullmatch(r"([a-z]+)([1-9]\d*)", word)) and match[1] in COUNTS:
        return COUNTS[match[1]], int(match[2])
    name, _, value = word.partition("=")
    if value in CHOICES.get(name, ()):
        return name, value
    if name == "stages" and re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", value):
        return name, [int(number) for number in value.split(",")]
    raise UserError(f'--layout "{text}": {word} is no word of a layout; known are {KNOWN} (N from 1)')
