"""What is sent to SLURM for a run: the command, a copy of recipe and script, and what is known of jobs sent before."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megacode
from megacode.errors import UserError
from megacode.recipe import Recipe
from megacode.submit.restarts import FOLDER, append_line, read_lines, started_jobs

ROOT = Path(megacode.__file__).resolve().parents[1]
SCRIPT = ROOT / "launchers" / "slurm" / "train.sbatch"
OWN_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
"""Which cluster is meant, and who asks. Other variables of that kind are of the job that `submit` is called in."""
_COUNTED = "the layout is fitted to --nodes and --gpus-per-node (or --tasks-per-node); give those"
_KEPT = "megacode submit sets it, and the batch script counts on it; leave it out"
OWN = {
    "array": "the jobs of an array would train in one run folder; submit each run by itself",
    **dict.fromkeys(("nodes", "N", "ntasks", "n", "ntasks-per-node", "gpus-per-node", "gpus", "G"), _COUNTED),
    "signal": "give --signal-seconds",
    **dict.fromkeys(("export", "output", "o", "open-mode", "requeue", "no-requeue", "parsable"), _KEPT),
}
"""Options of sbatch that are not for `--sbatch`, and why."""
COMMANDS = ("sbatch", "squeue", "scontrol", "scancel")


@dataclass(frozen=True)
class Request:
    """The places that a run asks for.

    Attributes:
        nodes: Machines.
        tasks_per_node: Processes of a node.
        gpus_per_node: GPUs of a node; 0 trains on CPUs.
        launcher: srun or deepspeed.
        signal_seconds: So long before the time limit the run is asked to save.
        max_restarts: See `restarts.decide`.
        options: More options of sbatch, KEY=VALUE or KEY; they win over all others.
    """

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    launcher: str
    signal_seconds: int
    max_restarts: int
    options: Sequence[str]


def sbatch_command(request: Request, run: Path, script: Path, recipe: Path) -> list[str]:
    """The command that sends the job.

    Raises:
        UserError: an option that submit sets itself, or a path that sbatch would cut.
    """
    for option in (option.lstrip("-").split("=")[0] for option in request.options):
        if option in OWN:
            raise UserError(f"--sbatch {option}: {OWN[option]}")
    if "," in sys.executable:
        raise UserError(f"the path of Python, {sys.executable}, has a comma, at which sbatch cuts; use another one")
    variables = {
        "MEGACODE_PYTHON": sys.executable,
        "MEGACODE_LAUNCHER": request.launcher,
        "MEGACODE_MAX_RESTARTS": request.max_restarts,
    }
    if request.gpus_per_node == 0:
        variables["DS_ACCELERATOR"] = "cpu"
    options: dict[str, Any] = {
        "job-name": run.name,
        "nodes": request.nodes,
        "ntasks-per-node": request.tasks_per_node,
        "signal": f"B:USR1@{request.signal_seconds}",
        "output": f"{str(run / FOLDER).replace('%', '%%')}/job_%j.txt",
        "export": ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())]),
    }
    if request.gpus_per_node:
        options["gpus-per-node"] = request.gpus_per_node
    given = [f"--{key}={value}" for key, value in options.items()]
    given += [f"--{option.lstrip('-')}" for option in request.options]
    return ["sbatch", "--parsable", *given, str(script), str(recipe)]


def seconds_of(limit: str) -> int | None:
    """A time limit as sbatch takes it (90, 90:00, 1:30:00, 1-12, 1-12:00, 1-12:00:00); None for any other word."""
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in [*parts, days if dash else "0"]) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash or len(parts) == 3:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def check_commands() -> None:
    """Raises: UserError where SLURM's commands are not on PATH."""
    if absent := [command for command in COMMANDS if shutil.which(command) is None]:
        raise UserError(f"megacode submit needs {', '.join(absent)} on PATH; call it where jobs can be sent")


def check_free(run: Path) -> None:
    """Refuse a run folder whose job waits or runs: two jobs would write the same files.

    Raises:
        UserError: names the job.
    """
    jobs = {line["job"] for line in read_lines(run / FOLDER / "jobs.jsonl")} | started_jobs(run)
    if not jobs:
        return
    queued = _call("squeue", "--noheader", f"--user={os.getuid()}", "--format=%A %T").splitlines()
    for job, state in (line.split() for line in queued):
        if job in jobs:
            raise UserError(
                f"run: the job {job} of {run} is {state.lower()} still; wait for it, end it (scancel {job}), or name "
                f"another `run` folder"
            )


@dataclass(frozen=True)
class Sent:
    """A job that SLURM has taken."""

    job: str
    folder: Path
    """RUN/slurm/TIME, with copies of recipe and script."""
    recipe: Path
    script: Path
    log: Path
    """Of the batch script."""
    command: list[str]


def send(request: Request, recipe: Recipe, facts: Mapping[str, Any]) -> Sent:
    """Copy recipe and script to RUN/slurm/TIME, and send the job. Nothing is left of one that is refused.

    Args:
        recipe: what will run.
        facts: noted with the job in RUN/slurm/jobs.jsonl.

    Raises:
        UserError: SLURM refuses it, or the run folder can't be written.
    """
    run = Path(recipe.run).absolute()
    folder = run / FOLDER / time.strftime("%Y%m%d-%H%M%S")
    script, copy = folder / SCRIPT.name, folder / "recipe.yaml"
    command = sbatch_command(request, run, script, copy)
    foreign = {key for key in os.environ if key.startswith("SLURM_")} - set(OWN_VARIABLES)
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    new = [path for path in folder.parents if not path.exists()]
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"run: another job of {run} is being sent in this second; wait for it") from None
    except OSError as error:
        _remove(folder, new)
        raise _unwritable(folder, error) from None
    try:
        shutil.copyfile(SCRIPT, script)
        recipe.save(copy)
        job = _call(*command, environment=environment).strip().split(";")[0]
    except OSError as error:
        _remove(folder, new)
        raise _unwritable(folder, error) from None
    except UserError as error:
        if "timed out" in str(error):  # the controller may have taken it, and start it
            told = f"{error}; but first see whether squeue shows the job: what it needs stays in {folder}"
            raise UserError(told) from None
        _remove(folder, new)
        raise
    line = {"job": job, "unix_time": time.time(), "folder": str(folder), "command": command, **facts}
    append_line(run / FOLDER / "jobs.jsonl", line)
    return Sent(job, folder, copy, script, run / FOLDER / f"job_{job}.txt", command)


def _remove(folder: Path, new: Sequence[Path]) -> None:
    """Remove a folder, and those above it that were new with it and hold nothing else, the innermost first."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in new:
        with suppress(OSError):
            path.rmdir()


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"run: cannot write {folder}: {error.strerror}; mend that or name another folder")


def code_version() -> dict[str, Any]:
    """Which code would run: megacode's version, its git commit, and whether files differ from that (None: no git)."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    dirty = None if changes is None else bool(changes)
    return {"version": megacode.__version__, "commit": commit, "dirty": dirty}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _call(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """What a command of SLURM prints. Raises: UserError where it fails."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} timed out after a minute; try again") from None
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}; mend SLURM's commands on PATH") from None
    if done.returncode:
        raise UserError(f"{command[0]} refused: {' '.join(done.stderr.split())}")
    return done.stdout
