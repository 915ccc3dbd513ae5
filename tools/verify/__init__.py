"""`megacode verify`: does a recipe train as it should? Stopped and resumed, and in any layout."""

from pathlib import Path
from typing import Annotated, Any

import typer

from megacode.errors import UserError
from megacode.plan.words import KNOWN
from megacode.recipe import load
from megacode.tools.output import JsonFile, json_output


def verify(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key.path=value", help="As for training.")] = None,
    layout: Annotated[
        list[str] | None, typer.Option(metavar="WORDS", help=f"A layout to compare with one process: {KNOWN}.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="A stopped run against a straight one.")] = False,
    steps: Annotated[int, typer.Option(help="Steps of each layout; with --resume, before the stop.", min=1)] = 4,
    more: Annotated[int, typer.Option(help="--resume: steps after the stop.", min=1)] = 4,
    processes: Annotated[
        int | None, typer.Option(help="--resume: of this machine; left out, tensor x pipeline x context.", min=1)
    ] = None,
    scale: Annotated[float, typer.Option(help="Make the model so many times narrower and shallower.", min=1)] = 1.0,
    json_file: JsonFile = None,
) -> None:  # fmt: skip
    """Check on this machine that a recipe trains as it should; exit code 1 where it does not.

    With --layout, which may come several times: train the recipe in each layout, and once in one process of plain
    torch, from the same weights on the same samples, and compare loss, gradient norm, every gradient and every weight.
    A word left out of a layout means 1, off, zero1; fp32 unless it says bf16. Layouts with as few micro-batches as
    stages are worth including: there the pipeline is all warm-up and cool-down (batch.global_samples=...).

    With --resume: train STEPS + MORE steps straight, and STEPS, stop, start again, MORE; loss, gradient norm and every
    file of weights and moments of the last checkpoint must be equal bit for bit. The learning rate's schedule is
    shortened to these steps. Both runs stand beside the recipe's run folder and are removed when they agree.

    Example: megacode verify my.yaml --scale 8 --layout "tp2 pp2 dp2 zero3" --layout "pp4 v2 zero2" --steps 3

    Example: megacode verify --resume launchers/recipes/demo.yaml --processes 8
    """
    from megacode.tools.verify.layouts import verify_layouts
    from megacode.tools.verify.resume import check_resume, verify_resume

    if not (layout or resume):
        raise UserError('say what to verify: --layout "tp2 pp2", --resume, or both')
    config = load(recipe, overrides)
    count = check_resume(config, scale, processes) if resume else 0
    results: dict[str, Any] = {}
    good = True
    with json_output(json_file) as write_json:
        if layout:
            results["layouts"] = verify_layouts(config, layout, scale, steps)
            good = all(row["ok"] for row in results["layouts"]["rows"])
        if resume:
            results["resume"] = verify_resume(recipe, overrides or [], config, scale, count, steps, more)
            good = good and not results["resume"]["differences"]
        write_json(results)
    raise typer.Exit(0 if good else 1)
