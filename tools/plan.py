"""`megacode plan`: does a recipe fit, what does a step cost, which layout is the quickest."""

import dataclasses
import sys
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from megacode import recipe as recipes
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError
from megacode.plan import report
from megacode.plan.hardware import HARDWARE, Hardware
from megacode.plan.layout import fit
from megacode.plan.memory import recipe_job
from megacode.plan.search import apply, mend, search
from megacode.plan.units import GIB, size, table_unit
from megacode.recipe import Recipe
from megacode.tools.output import JsonFile, json_output

RESERVED_GIB = 3.0
"""Of a device's memory, not for tensors: CUDA's context, NCCL's buffers, fragmentation."""
SHOWN_LAYOUTS, SHOWN_REASONS = 10, 15
MARK = "* with parallel.recompute or parallel.sequence"


class Device(StrEnum):
    """Kinds of GPU: the names in HARDWARE."""

    A100 = "A100"
    H100 = "H100"
    H200 = "H200"


def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe (YAML).")],
    gpus: Annotated[int, typer.Option(min=1, help="Number of processes, one a GPU.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.path=value]...", help="Replace values of the recipe.")
    ] = None,
    memory_gib: Annotated[
        float | None,
        typer.Option(help=f"GiB of a GPU that tensors may fill; left out, the device's less {RESERVED_GIB:g}."),
    ] = None,
    device: Annotated[Device, typer.Option(help="Kind of GPU; the options below replace what is known.")] = Device.H100,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that share fast links.")] = 8,
    peak_teraflops: Annotated[float | None, typer.Option(help="bf16 peak of a GPU.")] = None,
    efficiency: Annotated[float | None, typer.Option(help="Share of the peak that large matmuls attain.")] = None,
    memory_bandwidth: Annotated[float | None, typer.Option(help="GB/s of a GPU's memory, attained.")] = None,
    link_bandwidth: Annotated[float | None, typer.Option(help="GB/s in a node, one way per GPU.")] = None,
    network_bandwidth: Annotated[float | None, typer.Option(help="GB/s between nodes, one way per GPU.")] = None,
    searching: Annotated[
        bool, typer.Option("--search", help="Rank all layouts that fit; say why the others do not.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="Write the quickest layout as a recipe that names this one as its base.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Say whether a recipe fits a number of GPUs, stage by stage, and what its step costs. Needs no GPU and no torch.

    Exit code 1 where the recipe's own layout does not fit (with --search or --write: where no layout fits), 2 for a
    mistake in the recipe. Step times are estimates; docs/plan.md says how good.

    Example: megacode plan my.yaml --gpus 64 --memory-gib 76

    Example: megacode plan my.yaml --gpus 1024 --search --write fast.yaml
    """
    given = {
        "peak_teraflops": peak_teraflops, "efficiency": efficiency, "memory_gb_per_second": memory_bandwidth,
        "link_gb_per_second": link_bandwidth, "network_gb_per_second": network_bandwidth,
        "devices_per_node": gpus_per_node,
    }  # fmt: skip
    hardware = _hardware(device.value, given)
    if memory_gib is not None and not memory_gib > 0:
        raise UserError(f"--memory-gib must be above 0, not {memory_gib:g}")
    config = recipes.load(recipe, overrides)
    for option, file in (("--write", write), ("--json", json_file)):
        if file is not None and file.resolve() in recipes.files_of(recipe):
            raise UserError(f"{option}: {file} is the recipe, or one that it is based on; name another file")
    if write is not None and not write.absolute().parent.is_dir():
        raise UserError(f"--write: {write.parent} is no folder; make it, or name another file")
    planned = _with_vocabulary(config)
    limit_gib = hardware.memory_gib - RESERVED_GIB if memory_gib is None else memory_gib
    searching = searching or write is not None
    result: dict[str, Any] = {
        "recipe": str(recipe), "gpus": gpus, "memory_gib": limit_gib, "hardware": dataclasses.asdict(hardware),
    }  # fmt: skip
    with json_output(json_file) as write_json:
        result["own"] = _own(planned, gpus, hardware, limit_gib, refusal_is_an_answer=searching)
        good = bool(result["own"].get("fits"))
        if searching:
            found = search(planned, gpus, limit_gib * GIB, hardware)
            result["search"] = report.search_report(found, gpus)
            good = bool(found.fitting)
            if write is not None and good:
                report.write_recipe(write, recipe, apply(config, found.fitting[0].changes))
                result["written"] = str(write)
        write_json(result)
        _show(result)
    raise typer.Exit(0 if good else 1)


def _with_vocabulary(config: Recipe) -> Recipe:
    """The recipe with its tokenizer's vocabulary, where it leaves that to the tokenizer."""
    if config.model.vocabulary is not None:
        return config
    path = config.tokenizer.path
    if not Path(path).is_file():
        raise UserError(
            f"model.vocabulary is left to the tokenizer and {path} is not there; say it for the plan, e.g. "
            f"model.vocabulary=32016, or name a tokenizer with tokenizer.path"
        )
    model = config.model.model_copy(update={"vocabulary": Tokenizer(path).vocabulary})
    return config.model_copy(update={"model": model})


def _hardware(device: str, given: dict[str, Any]) -> Hardware:
    for key, value in given.items():
        if value is not None and not value > 0:
            raise UserError(f"--{key.replace('_', '-')} must be above 0, not {value}")
    return dataclasses.replace(HARDWARE[device], **{key: value for key, value in given.items() if value is not None})


def _own(config: Recipe, gpus: int, hardware: Hardware, limit_gib: float, refusal_is_an_answer: bool) -> dict[str, Any]:
    """The report of the recipe's own layout, with a verdict; `refused` where the layout can't be at all."""
    try:
        job = recipe_job(config, fit(config, gpus))
    except UserError as error:
        if not refusal_is_an_answer:
            raise
        return {"refused": str(error), "verdict": f"refused: {error}"}
    own = report.layout_report(config, job, hardware, limit_gib * GIB)
    need = f"stage {own['worst_stage']} needs {size(own['worst_gib'] * GIB)} of {size(limit_gib * GIB)}"
    if own["fits"]:
        own["verdict"] = f"fits: {need}"
    else:
        own["verdict"] = f"does not fit: {need}; {mend(config, gpus, limit_gib * GIB)}"
    return own


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, soft_wrap=not sys.stdout.isatty())
    own = result["own"]
    console.print(own["verdict"], style="bold", markup=False)
    if "stages" in own:
        _show_layout(console, own)
    if "search" in result:
        _show_search(console, result["search"])
    if "written" in result:
        console.print(f"\nwritten: {result['written']}", markup=False)


def _show_layout(console: Any, own: dict[str, Any]) -> None:
    layout = own["layout"]
    console.print(
        f"{own['parameters']:,} parameters; pipeline {layout['pipeline']} x data {layout['data']} x context "
        f"{layout['context']} x tensor "
        f"{layout['tensor']}, virtual_stages {layout['virtual_stages']}, {layout['num_micro_batches']} micro-batches"
    )
    kinds = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "total", "host")
    unit, amount = _amounts(row[f"{kind}_gib"] for row in own["stages"] for kind in kinds)
    rows = [
        [row["stage"], row["layers"], row["moment"], row["in_flight"], *(amount(row[f"{kind}_gib"]) for kind in kinds)]
        for row in own["stages"]
    ]
    _table(console, f"{unit} of a GPU at its worst moment", ["stage", "layers", "moment", "in flight", *kinds], rows)
    unit, amount = _amounts(row[key] for row in own["policies"] for key in ("gib", "host_gib"))
    rows = [
        [
            row["gather"] or "-", row["reduce"], row["recompute"], row["offload"], amount(row["gib"]),
            "-" if row["sequence_parallel_gib"] is None else amount(row["sequence_parallel_gib"]),
            amount(row["host_gib"]), "fits" if row["fits"] else "no",
        ]
        for row in own["policies"]
    ]  # fmt: skip
    head = ["gather", "reduce", "recompute", "offload", unit, f"{unit}, sequence: true", f"host {unit} a GPU", ""]
    _table(console, "The worst stage under other policies", head, rows)
    unit, amount = _amounts(row["sent_bytes"] / GIB for row in own["exchanges"])
    rows = [
        [
            row["name"],
            str(row["calls"]) if row["most_calls"] == row["calls"] else f"{row['calls']} to {row['most_calls']}",
            amount(row["sent_bytes"] / GIB),
        ]
        for row in own["exchanges"]
    ]
    _table(console, "What one GPU of the slowest stage sends in a step", ["", "calls", unit], rows)
    parts = ", ".join(f"{name} {value:.3f}" for name, value in own["parts_seconds"].items() if value > 0)
    console.print(
        f"step {own['step_seconds']:.3f} s ({parts}); bubble {own['bubble']:.1%}\n"
        f"{own['tokens_per_second']:,.0f} tokens/s, {own['tokens_per_second_per_device']:,.0f} a GPU, "
        f"MFU {own['mfu']:.1%}"
    )


def _amounts(gib: Iterable[float]) -> tuple[str, Callable[[float], str]]:
    """The unit of a table's figures, given in GiB, and what writes one of them in it."""
    unit_bytes, name = table_unit(max(gib, default=0) * GIB)
    return name, lambda value: f"{value * GIB / unit_bytes:.2f}"


def _show_search(console: Any, found: dict[str, Any]) -> None:
    shown = found["fitting"][:SHOWN_LAYOUTS]
    unit, amount = _amounts(row["gib"] for row in shown)
    rows = [
        [
            number, row["layout"], f"{row['step_seconds']:.2f}", f"{row['tokens_per_second_per_device']:,.0f}",
            f"{row['bubble']:.1%}", amount(row["gib"]),
        ]
        for number, row in enumerate(shown, start=1)
    ]  # fmt: skip
    title = f"{len(found['fitting'])} layouts fit; the quickest"
    _table(console, title, ["", "layout", "step s", "tokens/s a GPU", "bubble", unit], rows)
    rows = [[row["count"], row["reason"], row["example"]] for row in found["rejected"][:SHOWN_REASONS]]
    title = f"Rejected, by reason ({len(rows)} of {len(found['rejected'])}; --json has all)"
    _table(console, title, ["layouts", "reason", "example"], rows)


def _table(console: Any, title: str, head: list[str], rows: list[list[Any]]) -> None:
    from rich import box
    from rich.table import Table

    if not rows:
        return
    table = Table(*head, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
