"""Whether a SLURM job starts again: decided by what its run has left, not by exit codes, which launchers change.

launchers/slurm/train.sbatch calls `python -m megacode.submit.restarts begin` before a start and `... end` after it. No
torch is loaded.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacode import recipe as recipes
from megacode.errors import UserError

FINISHED, GIVEN_UP, AGAIN, STOPPED = 0, 1, 3, 75
"""What `decide` may say, which are the exit codes of `end`; those of the job, too, except AGAIN."""
ASKED_BY_SLURM = "asked by SIGTERM"
"""What status.json says of a run that SLURM itself asked to end: without a word to the batch script where the cluster
preempts a job without the signal that it has wished for."""
STARTS_AT_A_STEP = 3
"""SLURM starts a job again by itself when a node is lost. A job that gained nothing in so many starts loses them."""
FOLDER = "slurm"
"""Of a run: what was sent and what became of it."""


@dataclass(frozen=True)
class Ending:
    """What is left of a start."""

    first_step: int
    """The step of the newest checkpoint when it began; 0: none."""
    step: int
    """That of the newest now."""
    status: dict[str, Any] | None
    """status.json, if this start has written it."""
    asked: bool
    """Whether SLURM asked the batch script to end: the time limit is near, or another job preempts this one."""
    restarts: int
    """How often the job has been started again."""
    max_restarts: int
    state: str
    """The job's, as squeue says it. Where SLURM is ending it already, it knows whether it comes back: not after
    scancel, by itself after a preemption."""


def decide(ending: Ending) -> tuple[int, str]:
    """FINISHED, STOPPED, AGAIN or GIVEN_UP, and why.

    A run that its user stopped stays stopped. Whatever else ended goes on from its newest checkpoint, if there is one
    that this start has made: otherwise the next start would come no further.
    """
    status = ending.status or {}
    outcome, message = status.get("outcome"), str(status.get("message", ""))
    if outcome == "finished":
        return FINISHED, f"the run has finished at step {status.get('step')}"
    asked = ending.asked or message == ASKED_BY_SLURM
    if outcome == "stopped" and not asked:
        return STOPPED, f"the run was stopped at step {status.get('step')} ({message}); submit it again to go on"
    what = {
        None: "the run ended before it could say anything",
        "running": "the run ended without a word",
        "stopped": "the run was asked to stop and has saved",
    }.get(outcome, f"the run failed ({message})")
    if ending.state != "RUNNING":
        return STOPPED, f"{what}; SLURM calls the job {ending.state or 'unknown'}, and starts it again or not"
    if ending.step <= ending.first_step:
        least = "; ask for more time, or let it be asked earlier (--signal-seconds)" if asked else ""
        return GIVEN_UP, f"{what}; not started again: no step was gained since step {ending.first_step}{least}"
    if ending.restarts >= ending.max_restarts:
        mend = "submit it again, with a higher --max-restarts if need be"
        return GIVEN_UP, f"{what}; not started again: it was {ending.restarts} times already; {mend}"
    return AGAIN, f"{what}; it goes on from step {ending.step}"


def newest_step(run: Path) -> int:
    """The step of a run's newest checkpoint; 0 where there is none."""
    digits = "[0-9]" * 8
    return max((int(folder.name[-8:]) for folder in (run / "checkpoints").glob(f"step_{digits}")), default=0)


def read_status(run: Path) -> dict[str, Any] | None:
    """What RUN/status.json holds; None where there is none."""
    try:
        status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def begin(run: Path, job: str, restarts: int, max_restarts: int) -> Path:
    """Note that a start of a job begins. Returns: the folder for its ranks' logs.

    Raises:
        UserError: the job has been started too often, or in vain.
    """
    if restarts > max_restarts:
        raise UserError(f"the job was started again {restarts} times, more than --max-restarts {max_restarts}")
    step, status = newest_step(run), read_status(run)
    steps = [line["step"] for line in _lines(run) if line["job"] == job and line["event"] == "begin"]
    if steps[-STARTS_AT_A_STEP:] == [step] * STARTS_AT_A_STEP:
        raise UserError(f"the job began {STARTS_AT_A_STEP} times at step {step} and gained none; see the logs in {run}")
    identity = None if status is None else [status.get(key) for key in _IDENTITY]
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    _note(run, job, restarts, {"event": "begin", "step": step, "status": identity, "nodes": nodes})
    logs = run / "logs" / f"job_{job}_{restarts}"
    logs.mkdir(parents=True, exist_ok=True)
    return logs


def end(run: Path, job: str, restarts: int, max_restarts: int, state: str, asked: bool) -> tuple[int, str]:
    """What `decide` says of the start that `begin` has noted last; noted too."""
    began = next(line for line in reversed(_lines(run)) if line["job"] == job and line["event"] == "begin")
    status = read_status(run)
    if status is not None and [status.get(key) for key in _IDENTITY] == began["status"]:
        status = None  # an earlier start has left it
    ending = Ending(began["step"], newest_step(run), status, asked, restarts, max_restarts, state)
    code, reason = decide(ending)
    facts = {"event": "end", "step": ending.step, "asked": asked, "again": code == AGAIN, "reason": reason}
    _note(run, job, restarts, facts)
    return code, reason


_IDENTITY = ("unix_time", "host", "pid")


def _file(run: Path) -> Path:
    return run / FOLDER / "starts.jsonl"


def _lines(run: Path) -> list[dict[str, Any]]:
    file = _file(run)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _note(run: Path, job: str, restarts: int, facts: dict[str, Any]) -> None:
    file = _file(run)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as output:
            output.write(json.dumps({"unix_time": time.time(), "job": job, "restarts": restarts, **facts}) + "\n")
    except OSError as error:
        raise UserError(f"run: cannot write {file}: {error.strerror}") from None


def main(arguments: list[str]) -> int:
    """What the batch script calls; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m megacode.submit.restarts", description=__doc__)
    parser.add_argument("moment", choices=["begin", "end"])
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("--asked", action="store_true", help="SLURM has asked the job to end")
    parser.add_argument("--state", default="", help="what squeue calls the job now")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    try:
        run = Path(recipes.load(options.recipe, options.overrides).run)
        job, restarts = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if options.moment == "begin":
            print(begin(run, job, restarts, options.max_restarts))
            return 0
        code, reason = end(run, job, restarts, options.max_restarts, options.state, options.asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(reason, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
