"""`megacode schedule`: the timeline of one optimizer step on a pipeline, its bubble and its activations in flight."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from megacode.errors import UserError
from megacode.parallel.timeline import Timeline, bubble_formula, in_flight, in_flight_limit, simulate
from megacode.tools.diagrams import schedule_svg
from megacode.tools.drawing import standalone
from megacode.tools.output import JsonFile, json_output
from megacode.tools.report.style import schedule_style
from megacode.tools.schedule_text import schedule_text

MOST_OPERATIONS = 3_000_000
"""A larger step would take minutes and gigabytes."""
BACKWARDS = (0.1, 10.0)
"""A forward and a backward must both be wide enough to be drawn at one scale."""


def schedule(
    pp: Annotated[int, typer.Option(help="Pipeline ranks.")],
    microbatches: Annotated[int, typer.Option(help="Micro-batches of a step on each data rank.")],
    virtual: Annotated[int, typer.Option(help="Chunks a rank holds (interleaved stages).")] = 1,
    backward: Annotated[float, typer.Option(help="Time of a backward; a forward takes 1.")] = 2.0,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it as an SVG file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Draw the pipeline schedule of one optimizer step, from the lists of operations that training runs.

    Prints the timeline, the share of idle time (the bubble) beside its formula, and the most activations that each rank
    keeps. All chunks are alike and transfers take no time: it is the schedule's arithmetic, not a measurement.

    Example: megacode schedule --pp 4 --microbatches 8

    Example: megacode schedule --pp 4 --microbatches 8 --virtual 2 --svg schedule.svg
    """
    _check(pp, microbatches, virtual, backward)
    timeline = simulate(pp, microbatches, virtual, backward)
    if svg is not None:
        _write(svg, standalone(schedule_svg(timeline, virtual), schedule_style()))
    figures = _figures(timeline, microbatches, virtual, backward)
    with json_output(json_file) as write_json:
        if json_file is not None:
            write_json({**figures, "ranks": [_operations(timeline, rank) for rank in range(pp)]})
        for line in _text(timeline, figures, shutil.get_terminal_size().columns):
            typer.echo(line)


def _check(pp: int, microbatches: int, virtual: int, backward: float) -> None:
    for name, value in (("pp", pp), ("microbatches", microbatches), ("virtual", virtual)):
        if value < 1:
            raise UserError(f"--{name} must be 1 or more, not {value}")
    low, high = BACKWARDS
    if not low <= backward <= high:
        raise UserError(f"--backward must be from {low:g} to {high:g} forwards, not {backward:g}")
    if virtual > 1 and pp == 1:
        raise UserError("--virtual above 1 needs --pp above 1; leave --virtual out")
    if virtual > 1 and microbatches % pp:
        below = microbatches // pp * pp
        near = f"{below} or {below + pp}" if below else f"{pp}"
        raise UserError(
            f"interleaved stages need --microbatches ({microbatches}) to be a multiple of --pp ({pp}): take {near}, or "
            f"leave --virtual out"
        )
    operations = 2 * pp * microbatches * virtual
    if operations > MOST_OPERATIONS:
        raise UserError(
            f"the step has {operations:,} operations and at most {MOST_OPERATIONS:,} are drawn; take fewer "
            f"--microbatches (the middle of a step repeats itself) or a smaller --pp"
        )


def _write(file: Path, drawing: str) -> None:
    try:
        file.write_text(drawing, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; name another file with --svg") from None


def _figures(timeline: Timeline, microbatches: int, virtual: int, backward: float) -> dict[str, Any]:
    """What there is to say beside the drawing."""
    pp = len(timeline.ranks)
    kept = [in_flight((timed.operation for timed in rank), virtual) for rank in timeline.ranks]
    return {
        "pipeline": pp,
        "num_micro_batches": microbatches,
        "virtual_stages": virtual,
        "backward": backward,
        "duration": timeline.duration,
        "bubble_share": timeline.bubble_share,
        "bubble_formula": bubble_formula(pp, microbatches, virtual),
        "in_flight": [max(map(sum, rank)) for rank in kept],
        "in_flight_limit": [in_flight_limit(pp, rank, virtual) for rank in range(pp)],
    }


def _operations(timeline: Timeline, rank: int) -> list[dict[str, Any]]:
    return [
        {
            "kind": timed.operation.kind, "chunk": timed.operation.chunk, "micro_batch": timed.operation.micro_batch,
            "start": timed.start, "stop": timed.stop,
        }
        for timed in timeline.ranks[rank]
    ]  # fmt: skip


def _text(timeline: Timeline, figures: dict[str, Any], width: int) -> list[str]:
    pp, microbatches, virtual = (figures[key] for key in ("pipeline", "num_micro_batches", "virtual_stages"))
    name, chunks, part = "1F1B", "", "all of a rank's layers"
    if virtual > 1:
        name, chunks, part = "interleaved 1F1B", f" x {virtual} chunks", f"1/{virtual} of a rank's layers"
    formula = "(p - 1) / (v m + p - 1)" if virtual > 1 else "(p - 1) / (m + p - 1)"
    counts = zip(figures["in_flight"], figures["in_flight_limit"], strict=True)
    return [
        f"{name}: {_count(pp, 'rank')}{chunks}, {_count(microbatches, 'micro-batch', 'es')}, a backward takes "
        f"{figures['backward']:g}",
        "",
        *schedule_text(timeline, virtual, width),
        "",
        f"bubble {figures['bubble_share']:.2%} of the step; {formula} = {pp - 1}/{virtual * microbatches + pp - 1} = "
        f"{figures['bubble_formula']:.2%}",
        f"most micro-batches in flight, each of one chunk, {part} (limit):",
        *_columns([f"rank {rank}: {most} ({limit})" for rank, (most, limit) in enumerate(counts)], width),
    ]


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def _columns(cells: list[str], width: int) -> list[str]:
    """The cells, as many in a line as there is room for."""
    size = max(map(len, cells)) + 3
    each = max(1, (width + 1) // size)
    return [
        "  " + "".join(cell.ljust(size) for cell in cells[start : start + each]).rstrip()
        for start in range(0, len(cells), each)
    ]
