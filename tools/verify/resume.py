"""Does a stopped and resumed run go on as if it had not stopped?"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer

from megacode.errors import UserError
from megacode.plan.cases import shrunk
from megacode.plan.layout import fit
from megacode.plan.words import LayoutWords
from megacode.recipe import Recipe

FIGURES = ("loss", "grad_norm", "learning_rate", "tokens")


def check_resume(config: Recipe, scale: float, processes: int | None) -> int:
    """The number of processes.

    Raises:
        UserError: they can't share the recipe; said before any work.
    """
    parallel = config.parallel
    count = processes or parallel.tensor * parallel.pipeline * parallel.context
    fit(shrunk(config, scale, [LayoutWords(parallel)]), count)
    return count


def verify_resume(
    recipe: Path, overrides: list[str], config: Recipe, scale: float, count: int, steps: int, more: int
) -> dict[str, Any]:
    """Train in `count` processes, straight and with a stop; what differs, and how many files a checkpoint has.

    Raises:
        UserError: training refuses the recipe.
    """
    parent = Path(config.run).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{Path(config.run).name}.verify.", dir=parent))
    straight, stopped = folder / "straight", folder / "stopped"
    command = _command(recipe, [*overrides, *_smaller(config, scale)], config, count, steps + more)
    print(f"{steps + more} steps without a stop", flush=True)
    try:
        _train(command, straight, "finished")
    except UserError:
        shutil.rmtree(folder)
        raise
    print(f"{steps} steps, and a stop", flush=True)
    stopped.mkdir()
    (stopped / "STOP").write_text(str(steps), encoding="utf-8")
    _train(command, stopped, "stopped")
    print(f"started again: {more} more steps", flush=True)
    _train(command, stopped, "finished")
    result = {"steps": steps, "more": more, "processes": count, **compare(straight, stopped)}
    for line in result["differences"]:
        print(f"differs: {line}")
    if result["differences"]:
        print(f"the resumed run is another run; both are in {folder}")
    else:
        shutil.rmtree(folder)
        figures = f"{', '.join(FIGURES)} of {steps + more} steps"
        print(f"equal bit for bit: {figures}, {result['files']} files of the checkpoint")
    return result


def _smaller(config: Recipe, scale: float) -> list[str]:
    """The overrides that shrink the recipe's model; a checkpoint of the whole one does not fit it."""
    if scale == 1:
        return []
    model = shrunk(config, scale, [LayoutWords(config.parallel)]).model
    keys = ("layers", "hidden", "heads", "kv_heads", "ffn")
    return [*(f"model.{key}={getattr(model, key)}" for key in keys), "checkpoint.start_from=null"]


def _command(recipe: Path, overrides: list[str], config: Recipe, processes: int, steps: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes)]
    place = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    short = {
        "schedule.steps": steps,
        "schedule.warmup_steps": min(config.schedule.warmup_steps, steps - 1),
        "checkpoint.every_steps": steps,
        "data.valid": "null",  # not compared
        "logging.wandb": "null",
        "logging.tensorboard": "false",
        "logging.profile_steps": "[]",
    }
    changes = [*overrides, *(f"{key}={value}" for key, value in short.items())]
    return [sys.executable, *launcher, *place, "-m", "megacode.train", str(recipe), *changes]


def _train(command: list[str], run: Path, outcome: str) -> None:
    """Start the run, or go on with it; its status must say `outcome` at the end, whatever the launcher returns."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # what torchrun would set, with a warning
    done = subprocess.run([*command, f"run={run}"], env=environment, text=True, capture_output=True, check=False)
    file = run / "status.json"
    status = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if status.get("outcome") == outcome:
        return
    refused = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if refused:
        raise UserError(refused[0].removeprefix("error: "))
    print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
    print(f"error: the run in {run} should be {outcome} and is {status.get('outcome', 'not started')}", file=sys.stderr)
    raise typer.Exit(1)


def compare(one: Path, other: Path) -> dict[str, Any]:
    """What differs between two runs: figures, each at the first step that differs, and files of the last checkpoint."""
    from megacode.checkpoint.keep import newest
    from megacode.checkpoint.reader import CheckpointReader

    differences = []
    lines = [_steps(run) for run in (one, other)]
    if lines[0].keys() != lines[1].keys():
        differences.append(f"steps {sorted(lines[0])} and {sorted(lines[1])}")
    for key in FIGURES:
        for step in sorted(lines[0].keys() & lines[1].keys()):
            a, b = (each[step][key] for each in lines)
            if a != b:
                differences.append(f"{key} of step {step}: {a!r} and {b!r}")
                break
    folders = [newest(run) for run in (one, other)]
    assert folders[0] is not None
    assert folders[1] is not None
    files = [CheckpointReader(folder).manifest["files"] for folder in folders if folder is not None]
    for name in sorted(files[0].keys() | files[1].keys()):
        if files[0].get(name) != files[1].get(name):
            differences.append(f"{name} of {folders[0].name}")
    return {"differences": differences, "files": len(files[0])}


def _steps(run: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}
