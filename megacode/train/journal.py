"""What a run tells while it runs: files of JSON lines, the console and trackers, written by a thread of their own.

Lives on rank 0 only. The training hands over a dict and goes on: writing, drawing and sending take none of its time.
"""

import contextlib
import json
import math
import queue
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megacode.errors import UserError, explain
from megacode.train.console import Console

CLOSE_SECONDS = 30.0
"""How long the end of a run waits for what is still to be written."""


class Tracker(Protocol):
    """Somewhere else that metrics go to: wandb, TensorBoard."""

    def log(self, values: dict[str, Any]) -> None:
        """One line of metrics."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class Journal:
    """Takes metrics and events in order and writes them in a thread.

    A tracker that fails is dropped, and stderr says so: a run is not worth less without it. A file of the run folder
    that can't be written ends the run.

    Args:
        run: the run folder; metrics.jsonl loses the lines after `step`, which a run that died left there.
        step: the step that the run goes on from.
        console: draws.
        trackers: where metrics go besides.
    """

    def __init__(self, run: Path, step: int, console: Console, trackers: Sequence[Tracker] = ()) -> None:
        self.run, self.console, self.trackers = run, console, list(trackers)
        _keep_up_to(run / "metrics.jsonl", step)
        self._files = {name: (run / f"{name}.jsonl").open("a", encoding="utf-8") for name in ("metrics", "events")}
        self._queue: queue.SimpleQueue[tuple[str, dict[str, Any]] | None] = queue.SimpleQueue()
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def metrics(self, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl; what is not finite becomes null.

        Raises:
            UserError: an earlier line could not be written.
        """
        self._put("metrics", {key: _finite(value) for key, value in values.items()})

    def event(self, event: str, step: int, text: str, **values: Any) -> None:
        """A line of events.jsonl, and `text` on the console; raises as `metrics`."""
        self._put("events", {"unix_time": time.time(), "step": step, "event": event, "text": text, **values})

    def close(self) -> None:
        """Write what is left. Called again it does nothing."""
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)

    def check(self) -> None:
        """Raise what went wrong in writing, if anything did.

        Raises:
            UserError: a line could not be written, for want of room say.
        """
        if self._problem is not None:
            raise self._problem

    def _put(self, kind: str, values: dict[str, Any]) -> None:
        self.check()
        self._queue.put((kind, values))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            kind, values = item
            try:
                self._files[kind].write(json.dumps(values, allow_nan=False) + "\n")
                self._files[kind].flush()
            except OSError as error:
                self._problem = UserError(f"{explain(error, self.run / f'{kind}.jsonl')}, then start again")
            except (ValueError, TypeError) as error:
                self._problem = error
            self._show(kind, values)
            if kind == "metrics":
                self._track(values)
        with contextlib.suppress(Exception):
            self.console.close()
        for tracker in self.trackers:
            self._guarded(tracker, tracker.close)

    def _show(self, kind: str, values: dict[str, Any]) -> None:
        """A console that is gone (a closed terminal, a pipe that nobody reads) does not end the run."""
        with contextlib.suppress(OSError, UnicodeError):
            self.console.show(kind, values)

    def _track(self, values: dict[str, Any]) -> None:
        for tracker in list(self.trackers):
            self._guarded(tracker, lambda tracker=tracker: tracker.log(values))

    def _guarded(self, tracker: Tracker, action: Any) -> None:
        try:
            action()
        except Exception as error:
            if tracker in self.trackers:
                self.trackers.remove(tracker)
            name = type(tracker).__name__
            print(f"{name} failed and is dropped: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> float:
    """The step of a line of metrics; infinity for one that is damaged."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _keep_up_to(path: Path, step: int) -> None:
    """Drop lines of later steps, damaged ones, and half a line at the end."""
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    with path.open(encoding="utf-8") as old, temporary.open("w", encoding="utf-8") as new:
        for line in old:
            if line.endswith("\n") and _step(line) <= step:
                new.write(line)
    temporary.replace(path)
