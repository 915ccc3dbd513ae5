"""`megacode verify`: does a recipe train as it should? So far: does a resumed run go on as if it had not stopped."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from megacode.errors import UserError
from megacode.recipe import Recipe, load

FIGURES = ("loss", "grad_norm", "learning_rate", "tokens")


def verify(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key.path=value", help="As for training.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="A stopped run against a straight one.")] = False,
    processes: Annotated[int | None, typer.Option(help="Of this machine; left out, tensor x pipeline.", min=1)] = None,
    steps: Annotated[int, typer.Option(help="Steps before the stop.", min=1)] = 4,
    more: Annotated[int, typer.Option(help="Steps after it.", min=1)] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the comparison to this file.")] = None,
) -> None:  # fmt: skip
    """Check on this machine that a recipe trains as it should; exit code 1 where it does not.

    With --resume: train STEPS + MORE steps straight, and STEPS, stop, start again, MORE; loss, gradient norm and every
    file of weights and moments of the last checkpoint must be equal bit for bit. The learning rate's schedule is
    shortened to these steps. Both runs stand beside the recipe's run folder and are removed when they agree.

    Example: megacode verify --resume launchers/recipes/demo.yaml --processes 8
    """
    if not resume:
        raise UserError("say what to verify: --resume")
    config = load(recipe, list(overrides or []))
    count = processes or config.parallel.tensor * config.parallel.pipeline
    parent = Path(config.run).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{Path(config.run).name}.verify.", dir=parent))
    straight, stopped = folder / "straight", folder / "stopped"
    command = _command(recipe, list(overrides or []), config, count, steps + more)
    print(f"{steps + more} steps without a stop", flush=True)
    _train(command, straight, "finished")
    print(f"{steps} steps, and a stop", flush=True)
    stopped.mkdir()
    (stopped / "STOP").write_text(str(steps), encoding="utf-8")
    _train(command, stopped, "stopped")
    print(f"started again: {more} more steps", flush=True)
    _train(command, stopped, "finished")
    result = {"steps": steps, "more": more, "processes": count, **compare(straight, stopped)}
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for line in result["differences"]:
        print(f"differs: {line}")
    if result["differences"]:
        print(f"the resumed run is another run; both are in {folder}")
        raise typer.Exit(1)
    shutil.rmtree(folder)
    print(f"equal bit for bit: {', '.join(FIGURES)} of {steps + more} steps, {result['files']} files of the checkpoint")


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
        "logging.validate_every_steps": steps,
        "logging.wandb": "null",
        "logging.tensorboard": "false",
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
    from megacode.checkpoint.store import CheckpointReader, newest

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
