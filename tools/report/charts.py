"""Parts of the page: figures with legend and data for the readout, tables, and how values are written."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from megacode.plan import units
from megacode.tools.drawing import LEFT, RIGHT, Series, axes_of, compact, escape, line_chart, swatch, tag

MOST_ROWS = 200
FULL, HALF = 1000, 490
"""Widths of a figure, in pixels."""


def curves_figure(
    title: str, series: Sequence[Series], unit: str = "", note: str = "", half: bool = False, log: bool = False,
    from_zero: bool = False, marks: Sequence[float] = (),
) -> str:  # fmt: skip
    """A figure of curves; where nothing is known, a line that says so."""
    several = len(series) > 1
    series = [curve for curve in series if curve.known]
    if not series:
        return f"<p>{escape(title)}: not recorded.</p>"
    width, height = (HALF, 230) if half else (FULL, 290)
    log = log and all(point.low > 0 for curve in series for point in curve.known)
    first, last = series[0].known[0], series[0].known[-1]
    description = (
        f"{title}, steps {min(c.known[0].x for c in series):,.0f} to {max(c.known[-1].x for c in series):,.0f}; "
        f"{series[0].name} from {compact(first.mean)} to {compact(last.mean)}"
    )
    axis = (unit or series[0].name) + (", logarithmic" if log else "")
    svg = line_chart(series, description, axis, width, height, log, from_zero, marks)
    axes = axes_of(series, width, height, log, from_zero)
    data = {
        "left": LEFT,
        "right": width - RIGHT,
        "low": axes.x_range[0],
        "high": axes.x_range[1],
        "series": [_data(curve) for curve in series],
    }
    return figure(title, svg, note, legend(series) if several else "", embed(data))


def _data(curve: Series) -> dict[str, Any]:
    """A curve for the script; six digits are enough to read."""
    known = curve.known
    values = {"y": [p.mean for p in known], "low": [p.low for p in known], "high": [p.high for p in known]}
    rounded = {name: [float(f"{value:.6g}") for value in column] for name, column in values.items()}
    return {"name": curve.name, "x": [p.x for p in known], **rounded}


def embed(data: Any) -> str:
    """JSON that the page's script reads; it can't end its element, whatever text is in it."""
    text = json.dumps(data, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return f'<script type="application/json">{text}</script>'


def figure(title: str, svg: str, note: str = "", legend: str = "", data: str = "") -> str:
    """A numbered figure."""
    caption = tag("b", escape(title)) + (f" \N{EN DASH} {escape(note)}" if note else "")
    return tag("figure", tag("figcaption", caption), legend, svg, data)


def legend(series: Sequence[Series]) -> str:
    """Samples of curves with their names."""
    return tag("ul", *(tag("li", swatch(c.style, c.dots), escape(c.name)) for c in series), class_="legend")


def row(*figures: str) -> str:
    """Figures side by side."""
    return tag("div", *(tag("div", one) for one in figures), class_="row")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table of cells that are markup already; of many rows the last ones.

    Args:
        heads: of the columns.
        rows: cells.
        numeric: columns of numbers, aligned to the right.
    """

    def line(cells: Sequence[str], name: str) -> str:
        return "".join(tag(name, cell, **({"class_": "n"} if i in numeric else {})) for i, cell in enumerate(cells))

    left_out = len(rows) - MOST_ROWS
    note = f"<p>The first {left_out:,} rows are left out.</p>" if left_out > 0 else ""
    body = "".join(tag("tr", line(cells, "td")) for cells in rows[-MOST_ROWS:])
    return note + tag("table", tag("thead", tag("tr", line(heads, "th"))), tag("tbody", body))


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """A table of names and values, which are markup already."""
    rows = "".join(tag("tr", tag("th", escape(name), scope="row"), tag("td", value)) for name, value in pairs)
    return tag("table", tag("tbody", rows))


def plain(value: Any) -> str:
    """A value of a file as text: lists and mappings too, what is not known as a dash."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(plain(inner) for inner in value)
    return str(value)


def rounded(value: float | None) -> str:
    """A loss."""
    return "\N{EN DASH}" if value is None else f"{value:.4f}"


def duration(seconds: float | None) -> str:
    """Seconds as 12.3 s, 4:05 min, 3:04 h or 2 d 3:04 h."""
    if seconds is None:
        return "\N{EN DASH}"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    days, hours = divmod(minutes // 60, 24)
    clock = f"{hours}:{minutes % 60:02} h"
    return f"{days} d {clock}" if days else clock


def size(num_bytes: float | None) -> str:
    """Bytes in binary units."""
    return "\N{EN DASH}" if num_bytes is None else units.size(num_bytes)


def moment(unix_time: float | None) -> str:
    """A time, in UTC."""
    if unix_time is None:
        return "\N{EN DASH}"
    try:
        return f"{datetime.fromtimestamp(unix_time, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return str(unix_time)
