"""`megacode submit`: send a recipe to a SLURM cluster, in a layout that fits the nodes."""

import dataclasses
import math
import shlex
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
from megacode.plan.search import Choice, apply, search
from megacode.plan.units import GIB, size
from megacode.recipe import Recipe
from megacode.submit import job as jobs
from megacode.submit.job import Request
from megacode.submit.restarts import newest_step
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
        int | None, typer.Option(min=1, help="Processes of a machine, with --gpus-per-node 0.")
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
) -> None:
    """Send a recipe to a SLURM cluster: it goes on by itself after time limits, preemptions and lost nodes.

    What can be wrong with recipe, data, layout and disk is found before anything is sent. Where the recipe's layout
    does not fit the processes, the nearest one that does is taken, and said. docs/slurm.md: what becomes of the job.

    Example: megacode submit my.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 --account lab --sbatch exclusive
    """
    if tasks_per_node is not None and gpus_per_node:
        raise UserError("--tasks-per-node is for CPUs (--gpus-per-node 0); with GPUs there is a process for each")
    limit_seconds = jobs.seconds_of(time) if time is not None else None
    if limit_seconds and limit_seconds <= signal_seconds:
        raise UserError(
            f"--time {time} is over before the run has begun: it is asked to save {signal_seconds} s before that; give "
            f"it more, or a smaller --signal-seconds"
        )
    tasks = gpus_per_node or tasks_per_node or 1
    config = recipes.load(recipe, overrides)
    run = Path(config.run)
    planned = _open(config)
    limit_bytes = (HARDWARE[device.value].memory_gib - RESERVED_GIB) * GIB if gpus_per_node else math.inf
    changes, reason = _fitting_changes(planned, nodes, tasks, device, limit_bytes)
    changed = _differences(config, changes)
    config, planned = apply(config, changes), apply(planned, changes)
    layout = fit(planned, nodes * tasks)
    if not dry_run:
        jobs.check_commands()
        jobs.check_free(run)
    named = {"time": time, "partition": partition, "account": account}
    options = [f"{key}={value}" for key, value in named.items() if value is not None] + (sbatch or [])
    request = Request(nodes, tasks, gpus_per_node, launcher.value, signal_seconds, max_restarts, options)
    _say_layout(layout, nodes, tasks, newest_step(run))
    if reason:
        typer.echo(f"the recipe's layout does not fit: {reason}\nchanged: {', '.join(changed)}")
    needed = worst_stage(recipe_job(planned, layout)).total_bytes
    if needed > limit_bytes:
        typer.echo(f"warning: by the plan a GPU needs {size(needed)} of {size(limit_bytes)}; see megacode plan")
    if dry_run:
        command = jobs.sbatch_command(request, run.absolute(), jobs.SCRIPT, Path("RECIPE_COPY"))
        typer.echo(shlex.join(command))
        return
    code = jobs.code_version()
    facts = {"recipe": str(recipe.absolute()), "overrides": overrides or [], "changed": changed, "code": code}
    job, folder = jobs.send(request, config, facts)
    commit = (code["commit"] or f"version {code['version']}")[:12] + (", with changes" if code["dirty"] else "")
    typer.echo(f"job {job}: {folder}/recipe.yaml (code {commit})\nlogs: {folder.parent}/job_{job}.txt, {run}/log")


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


def _fitting_changes(
    planned: Recipe, nodes: int, tasks: int, device: Device, limit_bytes: float
) -> tuple[dict[str, Any], str]:
    """What to change of the recipe, and why: `parallel` as little as can be, and of such layouts the quickest.

    Raises:
        UserError: no layout fits.
    """
    try:
        fit(planned, nodes * tasks)
    except UserError as error:
        reason = str(error)
    else:
        return {}, ""
    hardware = dataclasses.replace(HARDWARE[device.value], devices_per_node=tasks)
    found = search(planned, nodes * tasks, limit_bytes, hardware)
    if not found.fitting:
        why = min(found.rejected.values(), key=lambda rejection: -rejection.count).reason
        raise UserError(f"no layout fits {nodes} x {tasks} processes: {why}; megacode plan --search tells more")

    def distance(choice: Choice) -> tuple[int, int]:
        keys = _differences(planned, choice.changes)
        return sum(key.startswith("parallel.") for key in keys), len(keys)

    return min(found.fitting, key=distance).changes, reason


def _differences(config: Recipe, changes: dict[str, Any]) -> list[str]:
    """The keys that changes alter, as `key.path old -> new`."""
    before, after = (_dump(each) for each in (config, apply(config, changes)))
    lines = []
    for key, value in changes.items():
        names = [f"{key}.{name}" for name in value] if isinstance(value, dict) else [key]
        for path in names:
            section, _, name = path.partition(".")
            old, new = (values[section][name] if name else values[section] for values in (before, after))
            if old != new:
                lines.append(f"{path} {_word(old)} -> {_word(new)}")
    return lines


def _dump(config: Recipe) -> dict[str, Any]:
    """Sections and keys; policies that are left out are those that they stand for."""
    values, parallel = config.model_dump(), config.parallel
    values["parallel"] |= {"gather": parallel.gather_policy, "reduce": parallel.reduce_policy}
    return values


def _word(value: Any) -> str:
    return "left out" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _say_layout(layout: Layout, nodes: int, tasks: int, step: int) -> None:
    begins = f"goes on from step {step}" if step else "starts at step 0"
    typer.echo(
        f"{nodes} x {tasks} processes: pipeline {layout.pipeline} x data {layout.data} x context {layout.context} x "
        f"tensor {layout.tensor}, {layout.num_micro_batches} micro-batches; {begins}"
    )
