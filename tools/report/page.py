"""The page of a run: header, sections, and the frame around them."""

import base64
import hashlib

from megacode.tools.drawing import escape, tag
from megacode.tools.report import figures, records
from megacode.tools.report.charts import duration, moment, plain, rounded
from megacode.tools.report.run import Run, number
from megacode.tools.report.style import SCRIPT, STYLE

SECTIONS = (
    ("loss", "Loss", figures.loss),
    ("optimizer", "Gradient and learning rate", figures.optimizer),
    ("throughput", "Throughput and memory", figures.throughput),
    ("mixture", "Mixture", figures.mixture),
    ("layout", "Layout", figures.layout),
    ("schedule", "Pipeline schedule", figures.schedule),
    ("environment", "Environment", records.environment),
    ("starts", "Starts", records.starts),
    ("checkpoints", "Checkpoints", records.checkpoints),
    ("events", "Events", records.events),
    ("recipe", "Recipe", records.recipe),
)
"""(anchor, heading, what makes it), in order."""


def make_page(run: Run) -> str:
    """The whole report: one HTML page that needs no network and no script.

    Its content security policy lets the browser run the one script that is ours, by its hash, and load nothing.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = f"{run.name} \N{EN DASH} training report"
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    links = "".join(tag("a", escape(heading), href=f"#{anchor}") for anchor, heading, _ in SECTIONS)
    sections = "".join(
        tag("section", tag("h2", escape(heading), id=anchor), make(run)) for anchor, heading, make in SECTIONS
    )
    body = (
        _header(run)
        + tag("main", tag("nav", links, aria_label="Contents"), _notices(run), sections)
        + tag("footer", escape(_footer(run)))
        + f"<script>{SCRIPT}</script>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _header(run: Run) -> str:
    outcome = str(run.status.get("outcome", "unknown"))
    known = outcome if outcome in ("finished", "failed", "stopped", "running") else "unknown"
    words = []
    if run.status.get("rank") is not None:
        words.append(f"rank {plain(run.status['rank'])}:")
    if run.status.get("message"):
        words.append(plain(run.status["message"]))
    if outcome == "running":
        words.append("(a run that was killed may still say so)")
    written = number(run.status.get("unix_time"))
    words.append(f"\N{EN DASH} {moment(written)}" if written is not None else "")
    line = tag("strong", escape(outcome.capitalize()), class_=known) + escape(" ".join(words))
    cells = [
        tag("div", tag("dt", escape(name)), tag("dd", escape(value), tag("small", escape(more)) if more else ""))
        for name, value, more in _facts(run)
    ]
    return tag(
        "header", tag("p", "megacode training report", class_="kicker"), tag("h1", escape(run.name)),
        tag("p", line, class_="outcome"), tag("dl", *cells, class_="facts"),
    )  # fmt: skip


def _facts(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, what more there is to say) of the header's cells."""
    metrics, known = run.metrics, run.metrics.last_known
    step = number(metrics.last.get("step")) or number(run.status.get("step"))
    planned = number(run.setting("schedule.steps"))
    share = f"{step / planned:.1%} of {planned:,.0f}" if step is not None and planned else ""
    begun = number(run.starts[0].get("unix_time")) if run.starts else None
    written = number(run.status.get("unix_time"))
    wall = written - begun if written is not None and begun is not None else None
    validation = metrics.validation.points(("validation_loss",))
    at = validation[-1] if validation else None
    speed = metrics.curves.mean(("tokens_per_second",))
    mfu = metrics.curves.mean(("mfu",))
    world = number(run.last_start.get("world_size"))
    parameters = number(run.last_start.get("num_parameters"))
    num_starts = f"{len(run.starts):,} starts" if len(run.starts) > 1 else ""
    return [
        ("step", _whole(step), share),
        ("tokens", _whole(known.get("tokens")), ""),
        ("last training loss", rounded(known.get("loss")), ""),
        ("last validation loss", rounded(known.get("validation_loss")), f"step {at.x:,.0f}" if at else ""),
        ("wall time", duration(wall), num_starts),
        ("time in steps", duration(metrics.step_seconds or None), ""),
        (
            "tokens/s, mean of steps",
            "\N{EN DASH}" if speed is None else f"{speed:,.0f}",
            "" if mfu is None else f"MFU {mfu:.1%}",
        ),
        ("processes", _whole(world), "" if parameters is None else f"{parameters:,.0f} parameters"),
    ]


def _whole(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:,.0f}"


def _notices(run: Run) -> str:
    lines = list(run.notices)
    if run.metrics.num_without_loss:
        lines.append(f"steps without a finite loss: {run.metrics.num_without_loss:,}; the curve is broken there")
    if not lines:
        return ""
    return tag("ul", *(tag("li", escape(line)) for line in lines), class_="notices", aria_label="Notices")


def _footer(run: Run) -> str:
    width = run.metrics.curves.width
    if width == 1:
        return "Each point of a curve is one step."
    return (
        f"{run.metrics.num_steps:,} steps are drawn in bins of {width:,}: a curve is the mean of its bin, "
        "the shade around it goes from the least to the largest value."
    )
