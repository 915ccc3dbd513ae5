"""`megacode submit`: send a recipe to a SLURM cluster, in a layout that fits the nodes."""

import math
import shlex
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from megacode import recipe as recipes
from megacode.data.source import Source, find_shards
from megacode.data.stream import check
from megacode.errors import UserError
from megacode.plan.hardware import HARDWARE
from megacode.plan.layout import Layout, fit
from megacode.plan.memory import recipe_job, worst_stage
from megacode.plan.nearest import Places, differences, nearest
from megacode.plan.search import apply
from megacode.plan.units import GIB, size
from megacode.recipe import Recipe
from megacode.submit import job as jobs
from megacode.submit.job import Request
from megacode.submit.restarts import newest_step
from megacode.tools.output import JsonFile, json_output
from megacode.tools.plan import RESERVED_GIB, Device


class Launcher(StrEnum):
    """Who starts the processes of a node."""

    SRUN = "srun"
    DEEPSPEED = "deepspeed"


def submit(
    recipe: Annotated[Path, typer.Argument(help="The recipe (YAML).")],
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.path=value]...", help="Replace values of the recipe.")
    ] = None,
    gpus_per_node: Annotated[
        int, typer.Option(min=0, help="GPUs of a machine, a process for each; 0 trains on CPUs.")
    ] = 8,
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes of a machine; needed with --gpus-per-node 0, and only there.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Kind of GPU, for its memory.")] = Device.H100,
    launcher: Annotated[
        Launcher, typer.Option(help="srun: a task for each process; deepspeed: a task for each machine.")
    ] = Launcher.SRUN,
    time: Annotated[str | None, typer.Option(help="Time limit of a start, as sbatch takes it.")] = None,
    partition: Annotated[str | None, typer.Option(help="As sbatch takes it.")] = None,
    account: Annotated[str | None, typer.Option(help="As sbatch takes it.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY[=VALUE]", help="Any other option of sbatch (qos=high, exclusive); repeat it."),
    ] = None,
    signal_seconds: Annotated[
        int, typer.Option(min=1, max=65535, help="So long before the limit the run saves: a step, a checkpoint, 60 s.")
    ] = 300,
    max_restarts: Annotated[int, typer.Option(min=0, help="So often the job starts again by itself, at most.")] = 100,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, and print the command only.")] = False,
    json: JsonFile = None,
) -> None:
    """Send a recipe to a SLURM cluster: it goes on by itself after time limits, preemptions and lost nodes.

    What can be wrong with recipe, data, layout and disk is found before anything is sent. Where the recipe's layout
    does not fit the processes, the nearest one that does is taken, and said. docs/slurm.md: what becomes of the job.

    Example: megacode submit my.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 --account lab --sbatch exclusive
    """
    _check_options(gpus_per_node, tasks_per_node, time, signal_seconds)
    tasks = gpus_per_node or tasks_per_node
    assert tasks is not None
    named = {"time": time, "partition": partition, "account": account}
    options = [f"{key}={value}" for key, value in named.items() if value is not None] + (sbatch or [])
    request = Request(nodes, tasks, gpus_per_node, launcher.value, signal_seconds, max_restarts, options)
    with json_output(json) as write:
        config, layout, changed, text = _fitted(recipes.load(recipe, overrides), request, device)
        run = Path(config.run).absolute()
        found: dict[str, Any] = {"run": str(run), "nodes": nodes, "tasks_per_node": tasks}
        found |= {"gpus_per_node": gpus_per_node, "step": newest_step(run), "layout": asdict(layout)}
        found["layout"]["stages"] = [[stage.start, stage.stop] for stage in layout.stages]
        found["changed"] = changed
        if dry_run:
            command = jobs.sbatch_command(request, run, jobs.SCRIPT, Path("RECIPE_COPY"))
            typer.echo(f"{text}\n{shlex.join(command)}")
            write({"job": None, "command": command, **found})
            return
        jobs.check_commands()
        jobs.check_free(run)
        code = jobs.code_version()
        facts = {"recipe": str(recipe.absolute()), "overrides": overrides or [], "changed": changed, "code": code}
        sent = jobs.send(request, config, facts)
        typer.echo(text)  # not before: it would look as if the job were sent
        commit = (code["commit"] or f"version {code['version']}")[:12] + (", with changes" if code["dirty"] else "")
        typer.echo(f"job {sent.job}: {sent.recipe} (code {commit})\nlogs: {sent.log}, {config.run}/log")
        log = {"log": str(sent.log), "rank_logs": str(run / "log" / f"job_{sent.job}_*" / "*")}
        files = {"folder": str(sent.folder), "recipe": str(sent.recipe), "script": str(sent.script), **log}
        write({"job": sent.job, "command": sent.command, **files, **found, "code": code})


def _check_options(gpus_per_node: int, tasks_per_node: int | None, time: str | None, signal_seconds: int) -> None:
    """Raises: UserError for options that do not go together."""
    if tasks_per_node is not None and gpus_per_node:
        raise UserError("--tasks-per-node is for CPUs (--gpus-per-node 0); with GPUs there is a process for each")
    if tasks_per_node is None and not gpus_per_node:
        raise UserError("--gpus-per-node 0 trains on CPUs; say how many processes a machine runs by --tasks-per-node")
    limit_seconds = jobs.seconds_of(time) if time is not None else None
    if limit_seconds and limit_seconds <= signal_seconds:
        raise UserError(
            f"--time {time} is over before the run has begun: it is asked to save {signal_seconds} s before that; give "
            f"it more, or a smaller --signal-seconds"
        )


def _fitted(config: Recipe, request: Request, device: Device) -> tuple[Recipe, Layout, list[str], str]:
    """The recipe in a layout that fits, the layout, what was changed for it, and what to say of it.

    Raises:
        UserError: no layout fits, or the run could not start.
    """
    planned, hardware = _open(config), HARDWARE[device.value]
    nodes, tasks = request.nodes, request.tasks_per_node
    limit_bytes = (hardware.memory_gib - RESERVED_GIB) * GIB if request.gpus_per_node else math.inf
    places = Places(nodes, tasks, "gpus-per-node" if request.gpus_per_node else "tasks-per-node")
    changes, reason = nearest(planned, places, limit_bytes, hardware)
    changed = differences(config, changes)
    config, planned = apply(config, changes), apply(planned, changes)
    layout, step = fit(planned, nodes * tasks), newest_step(Path(config.run))
    lines = [
        f"{nodes} x {tasks} processes: pipeline {layout.pipeline} x data {layout.data} x context {layout.context} x "
        f"tensor {layout.tensor}, {layout.num_micro_batches} micro-batches; "
        f"{f'goes on from step {step}' if step else 'starts at step 0'}"
    ]
    if reason:
        lines += [f"the recipe's layout does not fit: {reason}", f"changed: {', '.join(changed)}"]
    needed = worst_stage(recipe_job(planned, layout)).total_bytes
    if needed > limit_bytes:
        lines.append(f"warning: by the plan a GPU needs {size(needed)} of {size(limit_bytes)}; see megacode plan")
    return config, layout, changed, "\n".join(lines)


def _open(config: Recipe) -> Recipe:
    """Open tokenizer and shards, and give the recipe the tokenizer's vocabulary."""
    from megacode.checkpoint.origin import open_tokenizer

    tokenizer, planned = open_tokenizer(config)
    train = config.data.train
    sources = {"train": [train]} if isinstance(train, str) else {source.name: source.shards for source in train}
    if config.data.valid is not None:
        sources["valid"] = [config.data.valid]
    for name, patterns in sources.items():
        Source(name, find_shards(patterns), check=lambda shards: check(shards, tokenizer))
    _check_checkpoint(planned)
    return planned


def _check_checkpoint(planned: Recipe) -> None:
    """Refuse what the run would refuse at its start: another model or seed than its newest checkpoint has, no step that
    is left, weights to start from that are none of this model, or too little room for a checkpoint.
    """
    from megacode.checkpoint.keep import newest
    from megacode.checkpoint.origin import check_disk, open_weights

    check_disk(planned)
    if (found := newest(Path(planned.run))) is not None:
        reader = open_weights(planned, found)
        if reader.progress.seed != planned.seed:
            raise UserError(f"seed is {planned.seed} and {found} has {reader.progress.seed}; change it back")
        if reader.step >= planned.schedule.steps:
            raise UserError(f"schedule.steps is {planned.schedule.steps} and {found} has them all; raise it to go on")
        return
    if planned.checkpoint.start_from is not None:
        open_weights(planned, Path(planned.checkpoint.start_from), new_stage=True)
