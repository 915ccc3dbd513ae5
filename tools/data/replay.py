"""What a step of a run was trained on, from the run's recipe and the shards that it names: its samples are made again.

The recipe is that of the step's start: of the first checkpoint at or behind the step, which also tells where samples
stood then, or of the run folder where no checkpoint is that late. (A start may change the batch, or infilling.)
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacode import recipe as recipes
from megacode.data.readable import Run, runs
from megacode.data.stream import IGNORE, ORDER, Part, TrainStream, open_train
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError
from megacode.recipe import Recipe
from megacode.tools.data.painting import in_colours, legend, paint


@dataclass(frozen=True)
class Step:
    """A step that can be replayed."""

    number: int
    recipe_path: Path
    recipe: Recipe
    samples: range
    """Numbers of its samples."""
    stream: TrainStream
    tokenizer: Tokenizer
    unknown: str | None
    """Why it isn't known whether the shards are those of the run."""

    def choose(self, sample: int | None) -> Sequence[int]:
        """All samples of the step, or the one that is asked for.

        Raises:
            UserError: it is another step's.
        """
        if sample is None:
            return self.samples
        if sample not in self.samples:
            first, last = self.samples[0], self.samples[-1]
            raise UserError(f"--sample is {sample} and step {self.number} has samples {first} to {last}; name one")
        return [sample]

    def parts(self, number: int) -> list[tuple[Part, int]]:
        """The parts of a sample, each with its place in it."""
        parts = self.stream.explain(number)
        ends = np.cumsum([len(part.ids) for part in parts])
        return [(part, int(end) - len(part.ids)) for part, end in zip(parts, ends, strict=True)]

    def loss(self, number: int) -> np.ndarray:
        """Which tokens of a sample are predicted: [sequence + 1]."""
        return np.concatenate([[False], self.stream.sample(number).labels != IGNORE])


@dataclass(frozen=True)
class _Stand:
    """What is known of where a run's samples stood."""

    place: Path
    """The file that says it."""
    step: int = 0
    next_sample: int = 0
    sources: dict[str, dict[str, Any]] | None = None
    order: int | None = None


def open_step(run: Path, step: int) -> Step:
    """Open what a step's samples are made of.

    Raises:
        UserError: there is no such run or step, or its shards are missing or others than it had.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is no run folder (it has no recipe.yaml); name one, as the recipe's key `run` does")
    stands = {number: folder for folder in run.glob("checkpoints/step_*") if (number := _number(folder)) is not None}
    later = min((number for number in stands if number >= step), default=None)
    earlier = max((number for number in stands if number < step), default=None)
    path = run / "recipe.yaml" if later is None else stands[later] / "recipe.yaml"
    recipe = recipes.load(path)
    last = recipe.schedule.steps
    if not 1 <= step <= last:
        raise UserError(f"--step is {step} and schedule.steps of {path} is {last}; name a step from 1 to {last}")
    size = recipe.batch.global_samples
    if later is not None:
        stand = _of_checkpoint(stands[later])
    elif earlier is not None:
        stand = _of_checkpoint(stands[earlier])
    else:
        stand = _of_start(run / "starts.jsonl")
    first = stand.next_sample + (step - 1 - stand.step) * size
    tokenizer = Tokenizer(recipe.tokenizer.path)
    stream = open_train(recipe.data, tokenizer, recipe.batch.sequence_length, recipe.seed)
    _compare(stream, stand)
    unknown = None if stand.sources else f"{stand.place} does not tell what the shards were: they may be others now"
    return Step(step, path, recipe, range(first, first + size), stream, tokenizer, unknown)


def step_text(step: Step, numbers: Sequence[int], tokens: bool) -> Iterator[str]:
    """What is printed of a step: for each of the samples its parts, with their text if asked for."""
    first, last = step.samples[0], step.samples[-1]
    yield (
        f"step {step.number} of {step.recipe.schedule.steps}: samples {first} to {last}, "
        f"{step.stream.sequence_length} tokens each and the last label ({step.recipe_path})"
    )
    if step.unknown:
        yield f"note: {step.unknown}"
    colours = in_colours()
    if tokens and colours:
        yield legend()
    for number in numbers:
        source, epoch = step.stream.locate(number)
        yield f"\nsample {number}: source {step.stream.sources[source]}, epoch {epoch}"
        parts, loss = step.parts(number), step.loss(number) if tokens else None
        for part, place in parts:
            yield f"{place:>7} {part.kind:<7} {_origin(part)}"
            if loss is not None:
                yield paint(_runs(step, part, loss[place : place + len(part.ids)]), colours)


def as_json(step: Step, numbers: Sequence[int], tokens: bool) -> dict[str, Any]:
    """The same for programs. Tokens are those of the sample and its last label; `loss` says which are predicted."""
    return {
        "step": step.number,
        "recipe": str(step.recipe_path),
        "first_sample": step.samples[0],
        "num_samples": len(step.samples),
        "sequence_length": step.stream.sequence_length,
        "unknown": step.unknown,
        "samples": [_sample_json(step, number, tokens) for number in numbers],
    }


def _sample_json(step: Step, number: int, tokens: bool) -> dict[str, Any]:
    source, epoch = step.stream.locate(number)
    loss = step.loss(number) if tokens else None
    parts = []
    for part, place in step.parts(number):
        values: dict[str, Any] = {
            "kind": part.kind, "shard": part.prefix and str(part.prefix), "document": part.document,
            "start": part.start, "stop": part.stop, "place": place, "num_tokens": len(part.ids), "cuts": part.cuts,
        }  # fmt: skip
        if loss is not None:
            own = loss[place : place + len(part.ids)]
            shown = [{"text": run.text, "role": run.role, "loss": run.loss} for run in _runs(step, part, own)]
            values |= {"ids": part.ids.tolist(), "loss": own.tolist(), "runs": shown}
        parts.append(values)
    return {"number": number, "source": step.stream.sources[source], "epoch": epoch, "parts": parts}


def _runs(step: Step, part: Part, loss: np.ndarray) -> list[Run]:
    return runs(part.ids, part.kind, part.cuts, loss, step.tokenizer)


def _origin(part: Part) -> str:
    if part.kind == "padding":
        return f"{len(part.ids)} tokens"
    longer = f" ({len(part.ids)} here)" if len(part.ids) != part.stop - part.start else ""
    middle = "" if part.cuts is None else f", middle: characters {part.cuts[0]}..{part.cuts[1]}"
    return f"tokens {part.start}..{part.stop}{longer} of document {part.document} of {part.prefix}{middle}"


def _number(folder: Path) -> int | None:
    """The step of a finished checkpoint's folder."""
    digits = folder.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() and len(digits) == 8 else None


def _of_checkpoint(folder: Path) -> _Stand:
    path = folder / "manifest.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["progress"]
        sources, order = dict(values.get("sources") or {}), int(values.get("order", 1))
        return _Stand(path, int(values["step"]), int(values["next_sample"]), sources, order)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} cannot be read as a checkpoint's; move that folder away to do without it") from None


def _of_start(path: Path) -> _Stand:
    """What the newest start says; of a run without checkpoints, so that it began with the first sample."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        data = json.loads(lines[-1])["data"]
        return _Stand(path, sources=dict(data["sources"]), order=data.get("order"))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return _Stand(path)


def _compare(stream: TrainStream, stand: _Stand) -> None:
    """Refuse where the samples of these numbers are not those that the run had.

    Raises:
        UserError: says what differs.
    """
    if stand.order not in (None, ORDER):
        raise UserError(
            f"{stand.place} counts samples by version {stand.order} of their order and this megacode by {ORDER}; "
            "replay it with the megacode that trained it"
        )
    if not stand.sources:
        return
    here = stream.facts()
    if list(here) != list(stand.sources):
        raise UserError(
            f"data.train has the sources {', '.join(here)} and {stand.place} has {', '.join(stand.sources)}; "
            "bring back the recipe that the run had"
        )
    for name, facts in here.items():
        for key, value in facts.items():
            there = stand.sources[name].get(key) if isinstance(stand.sources[name], dict) else None
            if value != there:
                raise UserError(
                    f"the shards of data.train ({name}) have changed since: their {key} is {value} and {stand.place} "
                    f"has {there}; bring back those that the run read"
                )
