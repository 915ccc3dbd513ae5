"""The sections that list: environment, starts, checkpoints, events, recipe."""

import shlex
from collections.abc import Mapping
from typing import Any

from megacode.tools.drawing import escape, tag
from megacode.tools.report.charts import definitions, duration, moment, plain, size, table
from megacode.tools.report.run import Run, layout_of, number

MOST_HOSTS = 8
DASH = "\N{EN DASH}"


def _text(value: Any) -> str:
    return escape(plain(value))


def _time(value: Any) -> str:
    return tag("time", escape(moment(number(value))))


def _command(value: Any) -> str:
    words = [str(word) for word in value] if isinstance(value, list) else [plain(value)]
    return tag("code", escape(shlex.join(words)) if isinstance(value, list) else escape(words[0]))


def environment(run: Run) -> str:
    """On what the last start ran."""
    start = run.last_start
    if not start:
        return "<p>The environment is not known: starts.jsonl does not tell it.</p>"
    peak = number(start.get("peak_teraflops"))
    backends = start.get("backends")
    return definitions(
        [
            ("device", _text(start.get("device"))),
            ("peak of a device", DASH if peak is None else f"{peak:g} teraFLOP/s"),
            ("hosts", _hosts(start.get("hosts"))),
            ("parameters", _text(start.get("num_parameters"))),
            ("precision", _text(run.setting("precision"))),
            ("versions", _text(start.get("versions"))),
            ("backends", _pairs(backends) if isinstance(backends, dict) else _text(backends)),
            ("command", _command(start.get("command"))),
        ]
    )


def _pairs(values: Mapping[str, Any]) -> str:
    return "<br>".join(f"{_text(name)}: {_text(value)}" for name, value in values.items()) or DASH


def _hosts(hosts: Any) -> str:
    """Name and processes of each host; of many, behind a fold."""
    if not isinstance(hosts, dict) or not hosts:
        return _text(None)
    names = ", ".join(f"h{n} = {escape(name)} ({_text(count)})" for n, (name, count) in enumerate(hosts.items()))
    if len(hosts) <= MOST_HOSTS:
        return names
    return tag("details", tag("summary", f"{len(hosts):,} hosts"), names)


def starts(run: Run) -> str:
    """Each start, with what it went on from and on what."""
    rows = []
    for count, start in enumerate(run.starts, 1):
        checkpoint = start.get("checkpoint")
        hosts = start.get("hosts")
        rows.append(
            [
                str(count),
                _time(start.get("unix_time")),
                _text(start.get("step")),
                escape(str(checkpoint).rstrip("/").rpartition("/")[2]) if checkpoint else "the beginning",
                _text(start.get("world_size")),
                _shape(start),
                _text(len(hosts) if isinstance(hosts, dict) else None),
                _text(start.get("device")),
            ]
        )
    if not rows:
        return "<p>No start is recorded.</p>"
    heads = ["", "time", "from step", "from", "processes", "layout", "hosts", "device"]
    return table(heads, rows, (0, 2, 4, 6))


def _shape(start: Mapping[str, Any]) -> str:
    """PP4 DP2 CP2 TP2 SP V2, recompute full: what is off or 1 is left out but for the first axes."""
    layout = layout_of(start)
    if layout is None:
        return DASH
    said = start["layout"]
    words = [f"PP{layout.pipeline}", f"DP{layout.data}"]
    words += [f"CP{layout.context}"] if layout.context > 1 else []
    words += [f"TP{layout.tensor}"]
    words += ["SP"] if said.get("sequence") is True else []
    words += [f"V{layout.virtual_stages}"] if layout.virtual_stages > 1 else []
    again = said.get("recompute", "none")
    return " ".join(words) + (f", recompute {_text(again)}" if again != "none" else "")


def checkpoints(run: Run) -> str:
    """Each checkpoint, by its manifest."""
    rows = [
        [
            tag("code", escape(found.name)),
            _text(found.step),
            _time(found.unix_time),
            size(found.size_bytes),
            _text(found.num_files),
            escape(found.problem),
        ]
        for found in run.checkpoints
    ]
    if not rows:
        return "<p>There is no checkpoint.</p>"
    return table(["folder", "step", "written", "size", "files", ""], rows, (1, 3, 4))


def events(run: Run) -> str:
    """How many events of each kind there were, and the last ones."""
    if not run.num_events:
        return "<p>No event is recorded.</p>"
    counts = ", ".join(f"{_text(kind)} {count:,}" for kind, count in run.num_events.items())
    left_out = sum(run.num_events.values()) - len(run.events)
    said = f"<p>{counts}.{f' The first {left_out:,} are left out.' if left_out else ''}</p>"
    rows = [
        [
            _time(event.get("unix_time")),
            _text(event.get("step")),
            tag("span", _text(event.get("event")), class_=f"event-{event.get('event')}"),
            _event_text(event),
        ]
        for event in run.events
    ]
    return said + table(["time", "step", "event", "what"], rows, (1,)) + "".join(map(_who_waited, run.events))


def _who_waited(event: Mapping[str, Any]) -> str:
    """Of a stall, what each rank stood in."""
    lines = event.get("table")
    if event.get("event") != "stall" or not isinstance(lines, list):
        return ""
    heading = f"Who waited for whom, stall of {moment(number(event.get('unix_time')))}"
    stacks = tag("p", "The ranks' Python stacks are in ", tag("code", "stacks/"), " of the run folder.")
    return tag("h3", escape(heading)) + tag("pre", escape("\n".join(map(plain, lines))), class_="columns") + stacks


def _event_text(event: Mapping[str, Any]) -> str:
    """Its own words, or what belongs to it; a checkpoint's time and size."""
    if event.get("event") == "checkpoint" and number(event.get("seconds")) is not None:
        took = duration(number(event.get("seconds")))
        return escape(f"{plain(event.get('folder'))}, {size(number(event.get('bytes')))} in {took}")
    if event.get("text"):
        return _text(event["text"])
    return _text({key: value for key, value in event.items() if key not in ("unix_time", "step", "event")})


def recipe(run: Run) -> str:
    """The resolved recipe, folded."""
    if run.recipe_text is None:
        return "<p>recipe.yaml is missing.</p>"
    return tag("details", tag("summary", "recipe.yaml, every default filled in"), tag("pre", escape(run.recipe_text)))
