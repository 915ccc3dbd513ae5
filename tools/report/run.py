"""Reads a run folder as it is: whole, still growing, or left by a killed run. What is missing becomes a notice."""

import json
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megacode.errors import UserError
from megacode.plan.layout import Layout
from megacode.tools.report.curves import Curves, Key

MOST_EVENTS = 200
SINGLE = (
    *("loss", "loss_plain", "loss_infilled", "infilled_share", "grad_norm", "learning_rate"),
    *("step_seconds", "tokens_per_second", "mfu", "memory_bytes"),
)
GROUPED = ("loss_by_source", "phases")


def number(value: Any) -> float | None:
    """A finite number of a file, else None: null, NaN, text, true."""
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


@dataclass
class Metrics:
    """metrics.jsonl in one pass."""

    curves: Curves = field(default_factory=Curves)
    validation: Curves = field(default_factory=Curves)
    num_steps: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    """The last step's line."""
    last_known: dict[str, float] = field(default_factory=dict)
    """Name -> the last value that is a number; the validation's too."""
    labels: Counter[str] = field(default_factory=Counter)
    """Source -> labels over all steps."""
    infilled_labels: float = 0.0
    weighted_steps: float = 0.0
    """Labels of the steps whose infilled share is known; where labels are not told, the steps."""
    step_seconds: float = 0.0
    num_skipped: int = 0
    num_without_loss: int = 0

    def add(self, line: dict[str, Any]) -> None:
        """A line of the file."""
        step = number(line.get("step"))
        if step is None:
            return
        if "validation_loss" in line:
            loss = number(line["validation_loss"])
            self.validation.add(int(step), {("validation_loss",): loss})
            self._remember("validation_loss", loss)
            return
        values: dict[Key, float | None] = {(name,): number(line.get(name)) for name in SINGLE}
        for name in GROUPED:
            values |= {(name, str(part)): number(value) for part, value in _mapping(line.get(name)).items()}
        self.curves.add(int(step), values)
        self.num_steps += 1
        self.last = line
        for key, value in values.items():
            self._remember(".".join(key), value)
        self._remember("tokens", number(line.get("tokens")))
        self._count(line)

    def _remember(self, name: str, value: float | None) -> None:
        if value is not None:
            self.last_known[name] = value

    def _count(self, line: dict[str, Any]) -> None:
        labels = {str(name): number(value) or 0 for name, value in _mapping(line.get("labels_by_source")).items()}
        self.labels.update({name: int(count) for name, count in labels.items()})
        share = number(line.get("infilled_share"))
        if share is not None:
            weight = sum(labels.values()) if labels else 1.0
            self.infilled_labels += share * weight
            self.weighted_steps += weight
        self.step_seconds += number(line.get("step_seconds")) or 0.0
        self.num_skipped += bool(line.get("skipped"))
        self.num_without_loss += number(line.get("loss")) is None


@dataclass
class Checkpoint:
    """What the report says of a checkpoint."""

    name: str
    step: int | None
    num_files: int | None
    size_bytes: int | None
    unix_time: float | None
    problem: str = ""


@dataclass
class Run:
    """A run folder."""

    folder: Path
    metrics: Metrics
    status: dict[str, Any]
    starts: list[dict[str, Any]]
    events: deque[dict[str, Any]]
    """The last ones."""
    num_events: Counter[str]
    checkpoints: list[Checkpoint]
    recipe_text: str | None
    recipe: dict[str, Any]
    notices: list[str]
    """What is missing or damaged, a line each."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def last_start(self) -> dict[str, Any]:
        """The last line of starts.jsonl, or nothing."""
        return self.starts[-1] if self.starts else {}

    def setting(self, path: str) -> Any:
        """A value of the recipe by its key.path; None where there is none."""
        value: Any = self.recipe
        for key in path.split("."):
            value = _mapping(value).get(key)
        return value


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: it holds no run.
    """
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "status.json")):
        raise UserError(f"{folder} has no metrics.jsonl and no status.json; name a run folder (`run` of the recipe)")
    notices: list[str] = []
    metrics = Metrics()
    for line in json_lines(folder / "metrics.jsonl", notices, "there are no curves"):
        metrics.add(line)
    if not metrics.num_steps and (folder / "metrics.jsonl").is_file():
        notices.append("metrics.jsonl holds no step yet: there are no curves")
    starts = list(json_lines(folder / "starts.jsonl", notices, "layout, schedule and environment are not known"))
    events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
    num_events: Counter[str] = Counter()
    for event in json_lines(folder / "events.jsonl", notices, "skips, stops and failures are not known"):
        events.append(event)
        num_events[str(event.get("event"))] += 1
    status = _read_status(folder / "status.json", notices)
    text, recipe = _read_recipe(folder / "recipe.yaml", notices)
    checkpoints = _read_checkpoints(folder / "checkpoints")
    return Run(folder, metrics, status, starts, events, num_events, checkpoints, text, recipe, notices)


def json_lines(path: Path, notices: list[str], lost: str = "") -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, one by one; what can't be read is left out and noticed.

    Args:
        path: the file.
        notices: gets a line for a missing file, for damaged lines, for half a line at the end.
        lost: what the report can't say without the file.
    """
    if not path.is_file():
        notices.append(f"{path.name} is missing: {lost}")
        return
    damaged, text = [], "\n"
    with path.open(encoding="utf-8", errors="replace") as file:
        for count, text in enumerate(file, 1):
            try:
                value = json.loads(text)
            except ValueError:
                value = None
            if isinstance(value, dict):
                yield value
            else:
                damaged.append(count)
    if damaged and not text.endswith("\n"):
        notices.append(f"{path.name}: the last line is half written and left out")
        damaged.pop()
    if damaged:
        notices.append(f"{path.name}: {len(damaged)} damaged lines are left out, the first is line {damaged[0]}")


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _read_status(path: Path, notices: list[str]) -> dict[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8", errors="replace")))
    except FileNotFoundError:
        notices.append("status.json is missing: the outcome is not known")
    except ValueError:
        notices.append("status.json is damaged: the outcome is not known")
    return {}


def _read_recipe(path: Path, notices: list[str]) -> tuple[str | None, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        return text, _mapping(yaml.safe_load(text))
    except FileNotFoundError:
        notices.append("recipe.yaml is missing: the planned steps and the recipe are not known")
        return None, {}
    except yaml.YAMLError:
        notices.append("recipe.yaml is not YAML: the planned steps are not known")
        return text, {}


def _read_checkpoints(folder: Path) -> list[Checkpoint]:
    """All folders step_*, those that are still being written too, by name."""
    return [_read_checkpoint(path) for path in sorted(folder.glob("step_*")) if path.is_dir()]


def _read_checkpoint(folder: Path) -> Checkpoint:
    path = folder / "manifest.json"
    try:
        manifest = _mapping(json.loads(path.read_text(encoding="utf-8", errors="replace")))
        time = path.stat().st_mtime
    except FileNotFoundError:
        problem = "unfinished" if folder.name.endswith(".partial") else "manifest.json is missing"
        return Checkpoint(folder.name, None, None, None, None, problem)
    except ValueError:
        return Checkpoint(folder.name, None, None, None, None, "manifest.json is damaged")
    step = number(_mapping(manifest.get("progress")).get("step"))
    files = _mapping(manifest.get("files"))
    size = sum(int(number(_mapping(entry).get("bytes")) or 0) for entry in files.values())
    return Checkpoint(folder.name, None if step is None else int(step), len(files), size, time)


def layout_of(start: Mapping[str, Any]) -> Layout | None:
    """The layout of a line of starts.jsonl; None where it is missing or none that a run can have.

    Runs from before there was context parallelism do not say `context`: it was 1.
    """
    values = _mapping(start.get("layout"))
    names = ("pipeline", "data", "tensor", "virtual_stages", "num_micro_batches")
    try:
        sizes = {name: int(values[name]) for name in names} | {"context": int(values.get("context", 1))}
        stages = tuple(range(int(first), int(stop)) for first, stop in values["stages"])
    except (KeyError, TypeError, ValueError):
        return None
    layout = Layout(**sizes, stages=stages)
    possible = (
        all(size > 0 for size in sizes.values())
        and all(stages)
        and len(stages) == layout.pipeline * layout.virtual_stages
        and (layout.virtual_stages == 1 or layout.num_micro_batches % layout.pipeline == 0)
    )
    return layout if possible else None
