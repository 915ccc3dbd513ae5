"""Charts as SVG strings: line charts, stacked bars, bars of shares. Pure functions; colours are classes of the page.

Class `cN` is colour N of the page's palette of 6; `dN` is a dash. Whatever text comes in is escaped.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NUM_COLORS = 6
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40
"""Margins of a plot area, in pixels."""


@dataclass(frozen=True)
class Point:
    """One point of a curve: a value, or several steps' mean with the least and the largest."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """A curve. None where a value is not known: the line is broken there."""

    name: str
    points: Sequence[Point | None]
    style: int = 0
    """Number of its colour and dash."""
    dots: bool = False
    """Mark every point."""
    band: bool = True
    """Shade from the least to the largest value."""

    @property
    def known(self) -> list[Point]:
        """The points that there are."""
        return [point for point in self.points if point is not None]


def escape(value: object) -> str:
    """Text for HTML and SVG, inside attributes too."""
    return html.escape(str(value), quote=True)


def tag(name: str, *children: str, **attributes: object) -> str:
    """An element. Children are markup already; attributes are escaped (class_ is class, aria_label is aria-label)."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(round(value, 2) if isinstance(value, float) else value)}"'
        for key, value in attributes.items()
    )
    return f"<{name}{written}>{''.join(children)}</{name}>"


def label(x: float, y: float, text: object, anchor: str = "start", class_: str = "tick") -> str:
    """A line of text; `anchor` is start, middle or end."""
    return tag("text", escape(text), x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def picture(width: float, height: float, description: str, *children: str, class_: str = "chart") -> str:
    """An SVG of this size that scales with the page; readers of the screen are told the description."""
    return tag(
        "svg", *children, viewBox=f"0 0 {width:g} {height:g}", width=f"{width:g}", height=f"{height:g}",
        role="img", aria_label=description, class_=class_,
    )  # fmt: skip


def standalone(svg: str, style: str) -> str:
    """A picture as a file of its own: with its style sheet and a white ground."""
    opening, inside = svg.split(">", 1)
    ground = tag("rect", width="100%", height="100%", fill="#fff")
    return f'{opening} xmlns="http://www.w3.org/2000/svg">{tag("style", style)}{ground}{inside}\n'


def style_of(number: int) -> str:
    """The classes of the number-th series: colours first, then the colours again, dashed."""
    return f"c{number % NUM_COLORS} d{number // NUM_COLORS % 3}"


def compact(value: float) -> str:
    """A number in few characters: 0.00031 is 3.1e-4, 1234567 is 1.23M."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            unit = 1e3 if letter == "k" else unit
            return f"{value / unit:.3g}{letter}" if size / unit < 1000 else f"{value / unit:.0f}{letter}"
    return f"{value:,.4g}" if size < 1000 else f"{value:,.0f}"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    assert low < high
    step = 10 ** math.floor(math.log10((high - low) / most))
    while (high - low) / step > most:
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, with 2 and 5 between them where there is room.

    A range too narrow for two of these has the ticks of a plain axis.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        values = [factor * 10.0**power for power in powers for factor in factors]
        inside = [value for value in values if low <= value <= high]
        if len(inside) < 2:
            return ticks(low, high, most)
        if len(inside) <= most:
            return inside
    return inside[:: -(-len(inside) // most)]


@dataclass(frozen=True)
class Axes:
    """A plot area and its two scales."""

    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool = False

    def x(self, value: float) -> float:
        """Pixel of a value; never outside the plot area."""
        return LEFT + _between(value, *self.x_range) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixel of a value; never outside the plot area."""
        low, high = self.y_range
        if self.log:
            value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
        return self.height - BOTTOM - _between(value, low, high) * (self.height - TOP - BOTTOM)

    def draw(self, x_ticks: Iterable[tuple[float, str]], x_title: str, y_title: str) -> str:
        """Frame, grid, ticks and titles."""
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        parts = [tag("rect", x=LEFT, y=TOP, width=right - LEFT, height=bottom - TOP, class_="plot")]
        for value in (log_ticks if self.log else ticks)(*self.y_range, 6):
            y = self.y(value)
            parts += [tag("line", x1=LEFT, x2=right, y1=y, y2=y, class_="grid")]
            parts += [label(LEFT - 7, y + 4, compact(value), "end")]
        for value, text in x_ticks:
            x = self.x(value)
            parts += [tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis")]
            anchor = "end" if x > right - 12 else "middle"
            parts += [label(min(x, right), bottom + 17, text, anchor)]
        parts += [tag("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis")]
        parts += [
            label(right, self.height - 5, x_title, "end", "title"),
            label(LEFT, self.height - 5, y_title, "start", "title"),
        ]
        return "".join(parts)


def _between(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _widen(low: float, high: float, share: float = 0.04) -> tuple[float, float]:
    """A range that is not empty, with a little air."""
    if low == high == 0:
        return 0.0, 1.0
    if low == high:
        share, high, low = 0.0, high + abs(high) * 0.1, low - abs(low) * 0.1
    air = (high - low) * share
    return low - air if low < 0 or low > air else 0.0, high + air


def line_chart(
    series: Sequence[Series], description: str, y_title: str, width: float = 1000, height: float = 300,
    log: bool = False, from_zero: bool = False, marks: Sequence[float] = (),
) -> str:  # fmt: skip
    """Curves over steps.

    The y axis covers the means; a band that goes beyond is cut at the edge. At least one series must have a point.

    Args:
        series: the curves, first one on top.
        description: what a screen reader says.
        y_title: name and unit of the values.
        width: of the picture, pixels.
        height: of the picture, pixels.
        log: logarithmic y axis; all values must be above zero.
        from_zero: the y axis starts at zero.
        marks: steps with a vertical line (restarts).
    """
    axes = axes_of(series, width, height, log, from_zero)
    low, high = axes.x_range
    x_ticks = [(value, f"{value:,.0f}") for value in ticks(low, high, int(width / 90)) if value == round(value)]
    parts = [axes.draw(x_ticks, "step", y_title)]
    for mark in marks:
        x = axes.x(mark)
        parts.append(tag("line", x1=x, x2=x, y1=TOP, y2=height - BOTTOM, class_="mark"))
    for curve in reversed(series):
        parts += [_band(curve, axes)] if curve.band else []
    for curve in reversed(series):
        parts += [_line(curve, axes), _dots(curve, axes)]
    return picture(width, height, description, *parts)


def axes_of(series: Sequence[Series], width: float, height: float, log: bool, from_zero: bool = False) -> Axes:
    """The axes that `line_chart` draws these series on."""
    known = [point for curve in series for point in curve.known]
    x_range = min(point.x for point in known), max(point.x for point in known)
    if x_range[0] == x_range[1]:
        x_range = x_range[0] - 1, x_range[1] + 1
    low, high = min(point.mean for point in known), max(point.mean for point in known)
    if log:
        return Axes(width, height, x_range, (low / 1.2, high * 1.2), log)
    return Axes(width, height, x_range, _widen(min(0.0, low) if from_zero else low, high))


def _segments(points: Sequence[Point | None]) -> list[list[Point]]:
    """Points that follow each other without a gap."""
    segments: list[list[Point]] = [[]]
    for point in points:
        if point is None:
            segments.append([])
        else:
            segments[-1].append(point)
    return [segment for segment in segments if segment]


def _line(curve: Series, axes: Axes) -> str:
    paths = [
        "M" + "L".join(f"{axes.x(p.x):.1f},{axes.y(p.mean):.1f}" for p in segment)
        for segment in _segments(curve.points)
        if len(segment) > 1
    ]
    return tag("path", d="".join(paths), class_=f"line {style_of(curve.style)}") if paths else ""


def _band(curve: Series, axes: Axes) -> str:
    paths = []
    for segment in _segments(curve.points):
        there = "L".join(f"{axes.x(p.x):.1f},{axes.y(p.high):.1f}" for p in segment)
        back = "L".join(f"{axes.x(p.x):.1f},{axes.y(p.low):.1f}" for p in reversed(segment))
        paths += [f"M{there}L{back}Z"] if any(p.low < p.high for p in segment) else []
    return tag("path", d="".join(paths), class_=f"band c{curve.style % NUM_COLORS}") if paths else ""


def _dots(curve: Series, axes: Axes) -> str:
    """A dot for each point, or for those only that no line shows, being alone."""
    alone = [segment[0] for segment in _segments(curve.points) if len(segment) == 1]
    radius, marked = (3.2, curve.known) if curve.dots else (2.2, alone)
    return "".join(
        tag("circle", cx=axes.x(p.x), cy=axes.y(p.mean), r=radius, class_=f"dot c{curve.style % NUM_COLORS}")
        for p in marked
    )


def stacked_bars(
    names: Sequence[str], bars: Sequence[tuple[float, Sequence[float]]], description: str, y_title: str,
    width: float = 1000, height: float = 300,
) -> str:  # fmt: skip
    """Bars over steps, each a stack of parts.

    Args:
        names: of the parts, for the tooltips.
        bars: (step, value of each part), at equal distances.
        description: what a screen reader says.
        y_title: name and unit of the values.
        width: of the picture, pixels.
        height: of the picture, pixels.
    """
    highest = max(sum(parts) for _, parts in bars) or 1.0
    axes = Axes(width, height, (-0.5, len(bars) - 0.5), (0.0, highest * 1.04))
    every = max(1, round(len(bars) / (width / 110)))
    x_ticks = [(number, f"{step:,.0f}") for number, (step, _) in enumerate(bars) if number % every == 0]
    parts = [axes.draw(x_ticks, "step", y_title)]
    bar_width = min(60.0, 0.82 * (width - LEFT - RIGHT) / len(bars))
    for number, (step, values) in enumerate(bars):
        below = 0.0
        for index, (name, value) in enumerate(zip(names, values, strict=True)):
            top, bottom = axes.y(below + value), axes.y(below)
            tip = tag("title", escape(f"step {step:,.0f}: {name} {compact(value)}"))
            parts.append(
                tag(
                    "rect", tip, x=axes.x(number) - bar_width / 2, y=top, width=bar_width, height=bottom - top,
                    class_=f"part c{index % NUM_COLORS} o{index // NUM_COLORS % 3}",
                )
            )  # fmt: skip
            below += value
    return picture(width, height, description, *parts)


def share_bar(share: float, style: int = 0, width: float = 220) -> str:
    """A small bar for a cell of a table, beside the number that it shows."""
    return tag(
        "svg",
        tag("rect", x=0, y=0, width=width, height=10, class_="trough"),
        tag("rect", x=0, y=0, width=width * min(1.0, max(0.0, share)), height=10, class_=f"part c{style % NUM_COLORS}"),
        viewBox=f"0 0 {width:g} 10", width=f"{width:g}", height="10", class_="share", aria_hidden="true",
    )  # fmt: skip


def swatch(style: int, dots: bool = False, filled: bool = False) -> str:
    """The sample of a series in a legend."""
    if filled:
        shape = tag(
            "rect", x=5, y=1, width=12, height=10, class_=f"part c{style % NUM_COLORS} o{style // NUM_COLORS % 3}"
        )
    else:
        shape = tag("path", d="M0,6L22,6", class_=f"line {style_of(style)}")
        shape += tag("circle", cx=11, cy=6, r=3.2, class_=f"dot c{style % NUM_COLORS}") if dots else ""
    return tag("svg", shape, viewBox="0 0 22 12", width="22", height="12", class_="swatch", aria_hidden="true")
