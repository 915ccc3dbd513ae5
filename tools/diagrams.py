"""Drawings of a run's shape as SVG strings: the grid of ranks, and the timeline of the pipeline schedule. Pure."""

from collections.abc import Mapping

from megacode.parallel.timeline import Timeline
from megacode.plan.layout import Layout
from megacode.tools.drawing import NUM_COLORS, label, picture, tag

WIDTH = 1000
MOST_COLUMNS = 16
MOST_CELLS = 128
"""A layout with more columns or cells than this is drawn as one replica."""
LEAST_UNITS = 60
"""A schedule's beginning and end are drawn for at least this many units of time each."""
BREAK = 34
"""Pixels between the beginning and the end where a schedule's middle is left out."""


def host_of_rank(hosts: Mapping[str, int]) -> list[int]:
    """Number of the host of each rank: launchers count the ranks through the hosts, one after the other."""
    return [number for number, processes in enumerate(hosts.values()) for _ in range(processes)]


def layers_text(layout: Layout, pipeline_rank: int) -> str:
    """What a pipeline rank holds: "embedding, layers 0-3, 8-11"."""
    stages = range(pipeline_rank, len(layout.stages), layout.pipeline)
    spans = []
    for stage in stages:
        layers = layout.stages[stage]
        spans.append(f"{layers[0]}\N{EN DASH}{layers[-1]}" if len(layers) > 1 else f"{layers[0]}")
    words = [f"layer{'s' if sum(len(layout.stages[stage]) for stage in stages) > 1 else ''} {', '.join(spans)}"]
    if 0 in stages:
        words.insert(0, "embedding")
    if len(layout.stages) - 1 in stages:
        words.append("head")
    return ", ".join(words)


def drawn_replicas(layout: Layout) -> int:
    """How many data ranks `layout_svg` draws: all of a small layout, else one."""
    columns = layout.data * _columns_of_replica(layout)
    return layout.data if columns <= MOST_COLUMNS and layout.world_size <= MOST_CELLS else 1


def _columns_of_replica(layout: Layout) -> int:
    return layout.context * layout.tensor


def layout_svg(layout: Layout, hosts: Mapping[str, int]) -> str:
    """The grid of ranks: a row a pipeline rank, with its layers; a column a context and tensor rank, data ranks side by
    side.

    A cell shows the global rank (tensor fastest, then context, data, pipeline) and the number of its host, `hN`. Of a
    large layout one replica is drawn, with sheets behind it for the others.

    Args:
        layout: the layout.
        hosts: processes by host, in the order of ranks; when they are not as many as the layout's ranks, none is shown.
    """
    replicas, columns = drawn_replicas(layout), _columns_of_replica(layout)
    host_by_rank = host_of_rank(hosts) if sum(hosts.values()) == layout.world_size else []
    gap = 14 if replicas > 1 else 0
    room = WIDTH - 90 - 300 - gap * (replicas - 1)
    cell = min(60.0, room / (replicas * columns))
    row, left, top = 34 if host_by_rank else 26, 90.0, 44.0
    right = left + replicas * columns * cell + gap * (replicas - 1)
    parts = []
    if replicas < layout.data:
        for sheet in (2, 1):
            shift = 6 * sheet
            size = {"width": right - left + 4, "height": layout.pipeline * row + 4.0}
            parts.append(tag("rect", x=left - 4 + shift, y=top - 4 + shift, **size, class_="sheet"))
        right += 14
    for data in range(replicas):
        start = left + data * (columns * cell + gap)
        parts.append(label(start, 16, _data_text(layout, data, columns * cell), class_="title"))
        parts += _columns(layout, start, cell)
        for pipeline in range(layout.pipeline):
            for column in range(columns):
                rank = (pipeline * layout.data + data) * columns + column
                host = host_by_rank[rank] if host_by_rank else None
                parts += _cell(start + column * cell, top + pipeline * row, cell, row, rank, host)
    for pipeline in range(layout.pipeline):
        middle = top + pipeline * row + row / 2 + 3
        parts.append(label(left - 10, middle, f"pipeline {pipeline}", "end"))
        parts.append(label(right + 12, middle, layers_text(layout, pipeline)))
    height = top + layout.pipeline * row + 18
    description = f"Grid of {layout.world_size} ranks: {' x '.join(axes_words(layout))}"
    return picture(WIDTH, height, description, *parts, class_="chart layout")


def _data_text(layout: Layout, data: int, width: float) -> str:
    if drawn_replicas(layout) == 1:
        return f"data rank {data} of {layout.data:,}"
    return f"data {data}" if width >= 50 else f"d{data}"


def _columns(layout: Layout, start: float, cell: float) -> list[str]:
    """Above the columns of a data rank: their context and tensor ranks, as far as there is room."""
    words = [("context", "c", layout.context), ("tensor", "t", layout.tensor)]
    shown = [word for word in words if word[2] > 1]
    if cell < 24 or (len(shown) == 2 and cell < 36):
        spans = [f"{word} 0\N{EN DASH}{size - 1}" for word, _, size in shown]
        return [label(start, 36, ", ".join(spans))] if shown else []
    found = []
    for column in range(_columns_of_replica(layout)):
        ranks = {"c": column // layout.tensor, "t": column % layout.tensor}
        if len(shown) == 2:
            text = " ".join(f"{short}{rank}" for short, rank in ranks.items())
        else:
            word, short, _ = shown[0] if shown else words[1]
            text = f"{word} {ranks[short]}" if cell >= 60 else f"{short}{ranks[short]}"
        found.append(label(start + (column + 0.5) * cell, 36, text, "middle"))
    return found


def axes_words(layout: Layout) -> tuple[str, ...]:
    """Sizes of the axes, the slowest first: "4 pipeline", "2 data", "2 tensor"; context ranks where there are any."""
    context = [f"{layout.context} context"] if layout.context > 1 else []
    return f"{layout.pipeline} pipeline", f"{layout.data} data", *context, f"{layout.tensor} tensor"


def _cell(x: float, y: float, cell: float, row: float, rank: int, host: int | None) -> list[str]:
    color = 0 if host is None else host % NUM_COLORS
    box = tag("rect", x=x + 1, y=y + 1, width=cell - 2, height=row - 2, class_=f"cell c{color}")
    parts = [box]
    if cell >= 8 * len(str(rank)):
        parts.append(label(x + cell / 2, y + (14 if host is not None else row / 2 + 4), rank, "middle", "number"))
    if host is not None and cell >= 8 * len(f"h{host}"):
        parts.append(label(x + cell / 2, y + 27, f"h{host}", "middle"))
    return parts


def schedule_svg(timeline: Timeline, virtual_stages: int = 1) -> str:
    """The timeline of a step, a row a pipeline rank.

    Boxes carry the number of their micro-batch where it fits; chunks of interleaved stages differ in shade. Of a long
    step the beginning and the end are drawn, at the same scale, with a gap between them.
    """
    pipeline = len(timeline.ranks)
    windows = schedule_windows(timeline)
    left, top, row = 70.0, 10.0, 22.0 if pipeline <= 16 else 12.0
    bottom = top + pipeline * row
    scale = (WIDTH - left - 14 - BREAK * (len(windows) - 1)) / sum(stop - start for start, stop in windows)
    parts = []
    x = left
    for number, (start, stop) in enumerate(windows):
        width = (stop - start) * scale
        parts.append(tag("rect", x=x, y=top, width=width, height=pipeline * row, class_="idle"))
        parts += _boxes(timeline, (start, stop), (x, top), (scale, row), virtual_stages)
        parts.append(label(x, bottom + 16, f"{start:,.0f}"))
        parts.append(label(x + width, bottom + 16, f"{stop:,.0f}", "end"))
        if number + 1 < len(windows):
            middle = top + pipeline * row / 2 + 4
            parts.append(label(x + width + BREAK / 2, middle, "\N{MIDLINE HORIZONTAL ELLIPSIS}", "middle", "title"))
        x += width + BREAK
    names = range(0, pipeline, 1 if row > 14 else 2)
    parts += [label(left - 8, top + (rank + 0.5) * row + 4, f"rank {rank}", "end") for rank in names]
    parts += _legend(left, bottom + 30, virtual_stages)
    parts.append(label(WIDTH - 14, bottom + 30, "time, in forwards of one chunk", "end", "title"))
    description = (
        f"Timeline of 1F1B on {pipeline} pipeline ranks, {timeline.duration:,.0f} units long; "
        f"idle {timeline.bubble_share:.1%} of the time"
    )
    return picture(WIDTH, bottom + 36, description, *parts, class_="chart schedule")


def _legend(x: float, y: float, virtual_stages: int) -> list[str]:
    parts = []
    for number, kind in enumerate(("forward", "backward", "idle")):
        left = x + 100 * number
        parts += [tag("rect", x=left, y=y - 9, width=20, height=10, class_=kind), label(left + 26, y, kind)]
    return [*parts, label(x + 270, y, "lighter: later chunks")] if virtual_stages > 1 else parts


def schedule_windows(timeline: Timeline) -> list[tuple[float, float]]:
    """Spans of time that are drawn: everything, or a beginning that shows the warm-up and an end of the same length."""
    first_back = next(timed.stop for timed in timeline.ranks[0] if timed.operation.kind == "backward")
    part = max(LEAST_UNITS, first_back + 9)
    if timeline.duration <= 2 * part:
        return [(0.0, timeline.duration)]
    return [(0.0, part), (timeline.duration - part, timeline.duration)]


def _boxes(
    timeline: Timeline, window: tuple[float, float], corner: tuple[float, float], scales: tuple[float, float],
    virtual_stages: int,
) -> list[str]:  # fmt: skip
    """The operations within a window of time: one path for each kind and shade, and numbers where they fit."""
    (start, stop), (left, top), (scale, row) = window, corner, scales
    paths: dict[str, list[str]] = {}
    numbers = []
    for rank, operations in enumerate(timeline.ranks):
        for timed in operations:
            low, high = max(timed.start, start), min(timed.stop, stop)
            if low >= high:
                continue
            x, y, width = left + (low - start) * scale, top + rank * row, (high - low) * scale
            gap = 0.6 if width > 3 else 0.0
            box = f"M{x + gap:.1f},{y + 1:.1f}h{width - 2 * gap:.1f}v{row - 2:g}h{2 * gap - width:.1f}z"
            operation = timed.operation
            shade = operation.chunk * 3 // virtual_stages
            paths.setdefault(f"{operation.kind} o{shade}", []).append(box)
            if row > 14 and width >= 7 * len(str(operation.micro_batch)) + 2:
                numbers.append(label(x + width / 2, y + row / 2 + 4, operation.micro_batch, "middle", "inside"))
    return [*(tag("path", d="".join(boxes), class_=name) for name, boxes in paths.items()), *numbers]
