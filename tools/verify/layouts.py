"""Is a recipe's training in its layouts that of one process? The printed table, and the same as JSON."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from megacode.plan.cases import cases
from megacode.plan.model import num_parameters
from megacode.recipe import Recipe

if TYPE_CHECKING:
    from megacode.doctor.verify import Row

HEAD = ("layout", "processes", "micro-batches", "loss", "norm", "gradients", "worst gradient", "weights", "seconds", "")


def verify_layouts(config: Recipe, texts: Sequence[str], scale: float, steps: int) -> dict[str, Any]:
    """Train the recipe in layouts and in one process, and print how far they are apart; the same as plain values.

    Raises:
        UserError: a layout or the recipe is refused, before anything starts.
    """
    cases(config, texts, scale)  # what needs no torch is refused at once
    from megacode.doctor.machine import training_device

    if training_device().type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed else looks for accelerators, and says so
    from megacode.doctor.processes import Processes, RanksError
    from megacode.doctor.verify import place, prepare, verify

    config, wanted = prepare(config, texts, scale)
    cuda, where = place(wanted)
    start_from = config.checkpoint.start_from or f"random weights of seed {config.seed}"
    train = config.data.train
    on = train if isinstance(train, str) else ", ".join(source.name for source in train)
    print(f"{describe(config)}\nfrom {start_from}, on {on}, by {where}", flush=True)

    def world(size: int, timeout_seconds: float) -> Processes:
        return Processes(size, cuda, timeout_seconds)

    try:
        expected, rows = verify(config, wanted, steps, world, lambda line: print(line, flush=True))
    except RanksError as error:
        print(f"error: the training in one process failed: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    _show(rows)
    model = config.model.model_dump()
    alone = {"losses": expected.losses, "norms": expected.norms, "seconds": expected.seconds}
    return {"steps": steps, "where": where, "model": model, "one_process": alone, "rows": [*map(plain, rows)]}


def describe(config: Recipe) -> str:
    """Shape of the model and of a step's batch."""
    model, batch = config.model, config.batch
    return (
        f"model: {model.layers} layers, hidden {model.hidden}, {model.heads} heads, {model.kv_heads} kv_heads, "
        f"ffn {model.ffn}, vocabulary {model.vocabulary}: {num_parameters(model):,} parameters; "
        f"a step: {batch.global_samples} samples of {batch.sequence_length} tokens"
    )


def plain(row: "Row") -> dict[str, Any]:
    """A row as plain values; what is infinitely off, or not known, is null."""
    values: dict[str, Any] = {
        "layout": str(row.case.words), "processes": row.case.layout.world_size,
        "micro_batches": row.case.layout.num_micro_batches, "ok": not row.problems, "problems": row.problems,
    }  # fmt: skip
    off = row.differences
    if off is None:
        return values
    name, worst = off.worst
    return {
        **values,
        "losses": [*map(_number, row.figures.losses)],
        "norms": [*map(_number, row.figures.norms)],
        "loss_difference": _number(off.loss),
        "norm_difference": _number(off.norm),
        "gradient_difference": _number(off.gradient),
        "worst_gradient": {"name": name, "difference": _number(worst)},
        "weight_difference": _number(off.moved),
        "largest_weight_difference": _number(off.weight),
        "seconds": row.figures.seconds,
    }


def _number(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _cells(row: "Row") -> list[str]:
    off, layout = row.differences, row.case.layout
    head = [str(row.case.words), str(layout.world_size), str(layout.num_micro_batches)]
    verdict = "FAILED" if row.problems else "ok"
    if off is None:
        return [*head, *[""] * (len(HEAD) - len(head) - 1), verdict]
    name, worst = off.worst
    figures = [f"{value:.0e}" for value in (off.loss, off.norm, off.gradient)]
    return [*head, *figures, f"{worst:.0e} {name}", f"{off.moved:.0e}", f"{row.figures.seconds:.1f}", verdict]


def _show(rows: Sequence["Row"]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=not sys.stdout.isatty())
    table = Table(title="Off one process, relative", title_justify="left", box=box.SIMPLE_HEAD)
    for head in HEAD:
        table.add_column(head, overflow="fold")  # a parameter's name must be whole
    for row in rows:
        table.add_row(*_cells(row), style="bold red" if row.problems else None)
    console.print(table)
    for row in rows:
        for problem in row.problems:
            console.print(f"FAILED: {row.case.words}: {problem}", markup=False)
