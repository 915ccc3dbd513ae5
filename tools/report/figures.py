"""The sections that draw: loss, optimizer, throughput, mixture, layout, schedule."""

from megacode.parallel.timeline import simulate
from megacode.tools.diagrams import axes_words, drawn_replicas, host_of_rank, layout_svg, schedule_svg, schedule_windows
from megacode.tools.drawing import Point, Series, escape, share_bar, stacked_bars, swatch, tag
from megacode.tools.report.charts import (
    FULL,
    curves_figure,
    definitions,
    duration,
    figure,
    plain,
    rounded,
    row,
    size,
    table,
)
from megacode.tools.report.curves import Key
from megacode.tools.report.run import Run, layout_of, number

MOST_BARS = 60
MOST_DOTS = 100
GIB = 2**30
DASH = "\N{EN DASH}"


def _series(run: Run, key: Key, name: str, style: int = 0, scale: float = 1.0, band: bool = True) -> Series:
    points = run.metrics.curves.points(key)
    scaled = [p and Point(p.x, p.mean * scale, p.low * scale, p.high * scale) for p in points]
    return Series(name, scaled, style, band=band)


def _binned(run: Run) -> str:
    width = run.metrics.curves.width
    notes = [f"mean, least and largest of {width:,} steps"] if width > 1 else []
    notes += ["dotted: started again"] if _restarts(run) else []
    return "; ".join(notes)


def loss(run: Run) -> str:
    """Training, plain, infilled and validation loss; loss by source."""
    points = run.metrics.validation.points(("validation_loss",))
    validation = Series("validation", points, 1, dots=len(points) <= MOST_DOTS, band=False)
    overall = curves_figure(
        "Training and validation loss",
        [_series(run, ("loss",), "training"), validation],
        unit="loss, nats per token", note=_binned(run), marks=_restarts(run),
    )  # fmt: skip
    kinds = [
        _series(run, ("loss_plain",), "plain", 2, band=False),
        _series(run, ("loss_infilled",), "infilled", 3, band=False),
    ]
    sources = [
        _series(run, ("loss_by_source", name), name, style, band=False) for style, name in enumerate(_sources(run))
    ]
    parts = [overall, curves_figure("Loss of plain and of infilled documents", kinds, unit="loss, nats per token")]
    if len(sources) > 1:
        parts.append(curves_figure("Loss by source", sources, unit="loss, nats per token"))
    return "".join(parts)


def _restarts(run: Run) -> list[float]:
    """Steps that the run went on from, within the curves."""
    steps = [number(start.get("step")) for start in run.starts[1:]]
    points = [point for point in run.metrics.curves.points(("loss",)) if point is not None]
    return [step for step in steps if step and points and points[0].x <= step <= points[-1].x]


def _sources(run: Run) -> list[str]:
    """All sources, the one with the most labels first."""
    names = [key[1] for key in run.metrics.curves.keys if key[0] == "loss_by_source"]
    names += [name for name in run.metrics.labels if name not in names]
    return sorted(names, key=lambda name: -run.metrics.labels[name])


def optimizer(run: Run) -> str:
    """Gradient norm and learning rate."""
    clip = number(run.setting("optimizer.clip"))
    skipped = run.metrics.num_skipped
    note = f"before clipping at {clip:g}" if clip else ""
    said = f"<p>The updates of {skipped:,} steps were left out (see Events).</p>" if skipped else ""
    return said + row(
        curves_figure("Gradient norm", [_series(run, ("grad_norm",), "norm")], note=note, half=True, log=True),
        curves_figure(
            "Learning rate", [_series(run, ("learning_rate",), "learning rate", 2)], half=True, from_zero=True
        ),
    )


def throughput(run: Run) -> str:
    """Tokens a second, MFU, memory, seconds of a step and its phases."""
    parts = [
        curves_figure(
            "Throughput", [_series(run, ("tokens_per_second",), "tokens/s")], half=True, from_zero=True
        ),
        curves_figure(
            "Model FLOPs utilization", [_series(run, ("mfu",), "MFU", 3, 100)], unit="MFU, %", half=True, from_zero=True
        ),
        curves_figure(
            "Time of a step", [_series(run, ("step_seconds",), "seconds", 4)], half=True, from_zero=True
        ),
        curves_figure(
            "Peak memory of rank 0", [_series(run, ("memory_bytes",), "GiB", 2, 1 / GIB)], half=True, from_zero=True
        ),
    ]  # fmt: skip
    drawn, missing = [part for part in parts if "<figure" in part], [part for part in parts if "<figure" not in part]
    return row(*drawn) + "".join(missing) + _memory_by_rank(run) + _phases(run)


def _memory_by_rank(run: Run) -> str:
    values = run.status.get("memory_bytes")
    known = [number(value) for value in values] if isinstance(values, list) else []
    peaks = {rank: value for rank, value in enumerate(known) if value is not None}
    if not peaks:
        return ""
    most, least = max(peaks, key=peaks.__getitem__), min(peaks, key=peaks.__getitem__)
    return (
        f"<p>Peak memory over {len(peaks):,} ranks: {size(peaks[most])} on rank {most}, {size(peaks[least])} on rank "
        f"{least}.</p>"
    )


def _phases(run: Run) -> str:
    names = [key[1] for key in run.metrics.curves.keys if key[0] == "phases"]
    if not names:
        return "<p>Phases of a step: not recorded (logging.phases).</p>"
    bars = run.metrics.curves.stacks([("phases", name) for name in names], MOST_BARS)
    means = [run.metrics.curves.mean(("phases", name)) or 0.0 for name in names]
    description = "Phases of a step, mean seconds: " + ", ".join(
        f"{name} {mean:.3g}" for name, mean in zip(names, means, strict=True)
    )
    svg = stacked_bars(names, bars, description, "seconds of a step", FULL, 300)
    items = [
        tag("li", swatch(style, filled=True), escape(f"{name} {duration(mean)}, {mean / (sum(means) or 1):.1%}"))
        for style, (name, mean) in enumerate(zip(names, means, strict=True))
    ]
    note = "means of neighbouring steps" if len(bars) < run.metrics.num_steps else ""
    return figure("Phases of a step", svg, note, tag("ul", *items, class_="legend"))


def mixture(run: Run) -> str:
    """Share of each source and of infilling among the labels."""
    metrics = run.metrics
    total = sum(metrics.labels.values())
    rows = [
        [
            escape(name),
            f"{metrics.labels[name]:,}",
            f"{metrics.labels[name] / total:.2%}" if total else DASH,
            share_bar(metrics.labels[name] / total if total else 0.0, style),
            rounded(metrics.last_known.get(f"loss_by_source.{name}")),
        ]
        for style, name in enumerate(_sources(run))
    ]
    sources = table(["source", "labels", "share", "", "last loss"], rows, (1, 2, 4)) if rows else (
        "<p>Labels by source: not recorded.</p>"
    )  # fmt: skip
    if not metrics.weighted_steps:
        return sources + "<p>Share of infilling: not recorded.</p>"
    share = metrics.infilled_labels / metrics.weighted_steps
    rate = number(run.setting("data.infilling_rate"))
    note = f"{share:.2%} over all steps"
    note += f"; data.infilling_rate {rate:g} of the uncut documents" if rate is not None else ""
    series = [_series(run, ("infilled_share",), "infilled", 3, 100)]
    return sources + curves_figure("Labels in infilling documents", series, "% of the labels", note, from_zero=True)


def layout(run: Run) -> str:
    """The grid of ranks of the last start."""
    found = layout_of(run.last_start)
    if found is None:
        return "<p>The layout is not known: starts.jsonl does not tell it.</p>"
    hosts = {str(name): int(number(count) or 0) for name, count in _hosts(run).items()}
    note = " \N{MULTIPLICATION SIGN} ".join(axes_words(found))
    if drawn_replicas(found) < found.data:
        note += f"; one replica is drawn, there are {found.data:,} data ranks like it"
    if len(hosts) > 1 and len(host_of_rank(hosts)) == found.world_size:
        note += "; hN is the host"
    facts = [
        ("processes", f"{found.world_size:,} on {len(hosts):,} host{'s' if len(hosts) != 1 else ''}"),
        ("ZeRO stage", plain(run.setting("parallel.zero"))),
        ("virtual stages", plain(found.virtual_stages)),
        ("sequence parallelism", plain(run.setting("parallel.sequence") or None)),
        ("recomputation", plain(run.setting("parallel.recompute"))),
        ("batch", escape(_batch(run, found.num_micro_batches))),
    ]
    return figure("Grid of ranks", layout_svg(found, hosts), note) + definitions(facts)


def _hosts(run: Run) -> dict[str, object]:
    hosts = run.last_start.get("hosts")
    return hosts if isinstance(hosts, dict) else {}


def _batch(run: Run, num_micro_batches: int) -> str:
    values = [run.setting(f"batch.{name}") for name in ("global_samples", "micro_samples", "sequence_length")]
    samples, micro, length = (plain(value) for value in values)
    return f"{samples} sequences of {length} tokens; {num_micro_batches:,} micro-batches of {micro} on each data rank"


def schedule(run: Run) -> str:
    """The timeline of a step."""
    found = layout_of(run.last_start)
    if found is None:
        return "<p>The schedule is not known: starts.jsonl does not tell the layout.</p>"
    timeline = simulate(found.pipeline, found.num_micro_batches, found.virtual_stages)
    interleaved = f", {found.virtual_stages} chunks a rank, interleaved" if found.virtual_stages > 1 else ""
    said = (
        f"<p>1F1B of {found.num_micro_batches:,} micro-batches on {found.pipeline} pipeline "
        f"rank{'s' if found.pipeline > 1 else ''}{interleaved}. With a backward twice as long as a forward and "
        f"transfers that take no time, the ranks are idle <b>{timeline.bubble_share:.1%}</b> of the step (the bubble). "
        "This is the schedule's arithmetic, not a measurement.</p>"
    )
    windows = schedule_windows(timeline)
    note = ""
    if len(windows) > 1:
        note = f"beginning and end; {windows[1][0] - windows[0][1]:,.0f} of {timeline.duration:,.0f} units are left out"
    return said + figure("One step", schedule_svg(timeline, found.virtual_stages), note)
