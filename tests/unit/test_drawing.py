"""Charts and drawings: well-formed SVG, points where they belong, nothing that text could break."""

import math
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacode.parallel.stages import split_layers
from megacode.parallel.timeline import simulate
from megacode.plan.layout import Layout
from megacode.tools import diagrams, drawing
from megacode.tools.drawing import Point, Series

VALUES = st.floats(-1e9, 1e9, allow_nan=False).map(lambda value: 0.0 if abs(value) < 1e-9 else value)
EVIL = "\"><script>alert('x')</script>&"


def curve(values, **more):
    points = [None if v is None else Point(float(n), v, v - abs(v) / 3, v + abs(v) / 3) for n, v in enumerate(values)]
    return Series("curve", points, **more)


def parse(svg):
    return ET.fromstring(svg)


def elements(svg, name, class_):
    return [e for e in parse(svg).iter(name) if class_ in e.get("class", "").split()]


def coordinates(path):
    pairs = path.get("d").replace("Z", "").replace("M", "L").strip("L").split("L")
    return [tuple(map(float, pair.split(","))) for pair in pairs]


@given(st.lists(VALUES | st.none(), min_size=1, max_size=30).filter(lambda v: any(x is not None for x in v)))
def test_every_point_lies_in_the_plot_area(values):
    svg = drawing.line_chart([curve(values)], "a chart", "y")
    (plot,) = elements(svg, "rect", "plot")
    left, top, width, height = (float(plot.get(key)) for key in ("x", "y", "width", "height"))
    drawn = [point for path in elements(svg, "path", "line") for point in coordinates(path)]
    drawn += [(float(dot.get("cx")), float(dot.get("cy"))) for dot in elements(svg, "circle", "dot")]
    assert len(drawn) == sum(value is not None for value in values)
    drawn += [point for path in elements(svg, "path", "band") for point in coordinates(path)]
    assert all(left - 0.1 <= x <= left + width + 0.1 and top - 0.1 <= y <= top + height + 0.1 for x, y in drawn)


def test_higher_values_are_drawn_higher_and_later_ones_further_right():
    for log in (False, True):
        svg = drawing.line_chart([curve([1.0, 3.0, 10.0, 2.0])], "a chart", "y", log=log)
        points = coordinates(elements(svg, "path", "line")[0])
        assert [x for x, _ in points] == sorted(x for x, _ in points)
        assert sorted(range(4), key=lambda n: -points[n][1]) == [0, 3, 1, 2]
    rise = [points[0][1] - points[n][1] for n in (3, 2)]
    assert rise[0] / rise[1] == pytest.approx(math.log10(2), abs=0.01)


def test_a_line_breaks_where_a_value_is_not_known():
    svg = drawing.line_chart([curve([1.0, 2.0, None, 3.0, None, 4.0, 5.0])], "a chart", "y")
    (line,) = elements(svg, "path", "line")
    assert line.get("d").count("M") == 2
    assert len(elements(svg, "circle", "dot")) == 1  # the lonely one


@given(st.floats(-1e12, 1e12, allow_nan=False), st.floats(1e-6, 1e12), st.integers(3, 12))
def test_ticks_are_round_within_the_range_and_neither_few_nor_many(low, span, most):
    high = low + span
    if span < abs(low) * 1e-9:
        return
    found = drawing.ticks(low, high, most)
    assert (most - 1) / 2.6 - 1 <= len(found) <= most + 1
    assert all(low - span * 1e-6 <= tick <= high + span * 1e-6 for tick in found)
    assert found == sorted(set(found))


def test_ticks_by_hand():
    assert drawing.ticks(0.3, 10.2, 6) == [2, 4, 6, 8, 10]
    assert drawing.ticks(0, 1, 5) == pytest.approx([0.2 * n for n in range(6)])
    assert drawing.log_ticks(0.3, 40, 6) == [0.5, 1, 2, 5, 10, 20]
    assert drawing.log_ticks(1e-3, 1e9, 6) == pytest.approx([1e-3, 1, 1e3, 1e6, 1e9])
    assert len(drawing.log_ticks(6, 7.5, 6)) >= 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (3e-4, "3e-4"), (1234, "1,234"), (50_000, "50k"), (1_250_000, "1.25M"), (-2e9, "-2G")],
)
def test_numbers_are_short(value, text):
    assert drawing.compact(value) == text


def test_stacked_bars_have_the_height_of_their_values():
    svg = drawing.stacked_bars(["a", "b"], [(1.0, [1.0, 2.0]), (11.0, [3.0, 0.0])], "bars", "s")
    heights = [float(part.get("height")) for part in elements(svg, "rect", "part")]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.05)
    assert heights[2] == pytest.approx(3 * heights[0], abs=0.05)
    assert heights[3] == 0


def test_text_is_escaped_everywhere():
    evil = Series(EVIL, curve([1.0, 2.0]).points)
    layout = Layout(1, 1, 1, 1, 1, (range(2),))
    for svg in (
        drawing.line_chart([evil], EVIL, EVIL),
        drawing.stacked_bars([EVIL], [(1.0, [1.0])], EVIL, EVIL),
        diagrams.layout_svg(layout, {EVIL: 1}),
    ):
        assert not list(parse(svg).iter("script"))
        assert "<script" not in svg


def make_layout(pipeline, data, tensor, virtual_stages=1, layers=64, context=1):
    stages = tuple(split_layers(layers, pipeline * virtual_stages))
    return Layout(pipeline, data, tensor, virtual_stages, 2 * pipeline, stages, context)


def test_a_small_layout_is_drawn_whole_with_the_ranks_where_the_mesh_puts_them():
    layout = make_layout(2, 2, 2, layers=4)
    svg = diagrams.layout_svg(layout, {"a": 4, "b": 4})
    numbers = [text.text for text in elements(svg, "text", "number")]
    # a data rank at a time, pipeline by pipeline; tensor is the fastest axis, pipeline the slowest
    assert numbers == ["0", "1", "4", "5", "2", "3", "6", "7"]
    texts = [text.text for text in parse(svg).iter("text")]
    assert texts.count("h0") == texts.count("h1") == 4
    assert "embedding, layers 0\N{EN DASH}1" in texts
    assert "layers 2\N{EN DASH}3, head" in texts


@pytest.mark.parametrize(("pipeline", "data", "context", "tensor"), [(2, 2, 2, 1), (2, 1, 2, 2), (1, 2, 4, 2)])
def test_context_ranks_stand_between_data_and_tensor(pipeline, data, context, tensor):
    """In the order of the mesh's grid."""
    layout = make_layout(pipeline, data, tensor, context=context)
    svg = diagrams.layout_svg(layout, {"a": layout.world_size})
    grid = torch.arange(layout.world_size).view(pipeline, data, context, tensor)
    drawn = [int(text.text) for text in elements(svg, "text", "number")]
    assert drawn == grid.permute(1, 0, 2, 3).flatten().tolist()
    texts = [text.text for text in parse(svg).iter("text")]
    wanted = [f"c{c} t{t}" if tensor > 1 else f"context {c}" for c in range(context) for t in range(tensor)]
    assert [text for text in texts if text in wanted] == wanted * data
    assert f"{data} data x {context} context x {tensor} tensor" in svg


def test_of_a_large_layout_one_replica_is_drawn():
    layout = make_layout(16, 8, 8)
    assert layout.world_size == 1024
    svg = diagrams.layout_svg(layout, {f"n{n}": 8 for n in range(128)})
    numbers = {int(text.text) for text in elements(svg, "text", "number")}
    assert numbers == {pipeline * 64 + tensor for pipeline in range(16) for tensor in range(8)}
    assert "data rank 0 of 8" in svg
    assert len(elements(svg, "rect", "sheet")) == 2


def test_interleaved_stages_name_all_their_layers():
    layout = make_layout(2, 1, 1, virtual_stages=2, layers=8)
    assert diagrams.layers_text(layout, 0) == "embedding, layers 0\N{EN DASH}1, 4\N{EN DASH}5"
    assert diagrams.layers_text(layout, 1) == "layers 2\N{EN DASH}3, 6\N{EN DASH}7, head"


@pytest.mark.parametrize(("pipeline", "num_micro_batches", "virtual"), [(1, 3, 1), (4, 8, 1), (2, 4, 2)])
def test_a_schedule_has_a_box_for_each_operation_in_its_ranks_row(pipeline, num_micro_batches, virtual):
    timeline = simulate(pipeline, num_micro_batches, virtual)
    svg = diagrams.schedule_svg(timeline, virtual)
    for kind in ("forward", "backward"):
        boxes = [box for path in elements(svg, "path", kind) for box in path.get("d").strip("M").split("M")]
        assert len(boxes) == pipeline * num_micro_batches * virtual
        rows = sorted({float(box.split("h")[0].split(",")[1]) for box in boxes})
        assert len(rows) == pipeline
    assert f"idle {timeline.bubble_share:.1%}" in parse(svg).get("aria-label")


def test_of_a_long_schedule_beginning_and_end_are_drawn():
    timeline = simulate(8, 256)
    (start, head), (tail, stop) = diagrams.schedule_windows(timeline)
    assert (start, stop) == (0, timeline.duration)
    assert timeline.ranks[0][7].stop < head < tail
    spans = [float(rect.get("width")) for rect in elements(diagrams.schedule_svg(timeline), "rect", "idle")]
    assert len(spans) == 3
    assert spans[0] == spans[1] > 400 > 20 == spans[2]  # the last one is the legend's
