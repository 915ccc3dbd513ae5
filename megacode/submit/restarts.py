"""Whether a SLURM job starts again: decided by what its run has left, not by exit codes, which launchers change.

launchers/slurm/train.sbatch calls `python -m megacode.submit.restarts begin` before a start and `... end` after it. No
torch is loaded.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Container
from contextlib import suppress
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
ASKED_BY_FILE = "asked by the file "
"""... of a run that its user asked, by RUN/STOP."""
STARTS_AT_A_STEP = 3
"""A job that gained no step in so many starts is given up. Not after one: before SLURM knows that a node is lost the
ranks fail in some way, and with it goes what they had done since the newest checkpoint."""
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
    """The job's, as squeue says it; empty where that gets no answer. Where SLURM is ending it already, it knows whether
    it comes back: not after scancel, by itself after a preemption."""
    starts: int = 1
    """How many starts in a row have begun at `first_step`, with this one."""
    former: str = ""
    """`what` of the start before this one, if that began at `first_step` too."""

    @property
    def what(self) -> str:
        """How it ended."""
        status = self.status or {}
        outcome = status.get("outcome")
        told = {
            None: "the run ended before it could say anything",
            "running": "the run ended without a word",
            "finished": "the run has finished",
            "stopped": "the run was asked to stop",
        }
        return told.get(outcome, f"the run failed ({status.get('message', '')})")


def decide(ending: Ending) -> tuple[int, str]:
    """FINISHED, STOPPED, AGAIN or GIVEN_UP, and why.

    A run that its user stopped stays stopped. Whatever else ended goes on from its newest checkpoint, if this start has
    made one. If not, the next may come no further: the job is given up when it fails in the same words as before (a
    mistake that comes up each time), or in any way for the STARTS_AT_A_STEP-th time.
    """
    status, what = ending.status or {}, ending.what
    outcome, message = status.get("outcome"), str(status.get("message", ""))
    if outcome == "finished":
        return FINISHED, f"the run has finished at step {status.get('step')}"
    by_slurm = message == ASKED_BY_SLURM or (ending.asked and not message.startswith(ASKED_BY_FILE))
    if outcome == "stopped" and not by_slurm:
        return STOPPED, f"the run was stopped at step {status.get('step')} ({message}); submit it again to go on"
    if ending.state not in ("RUNNING", ""):
        return STOPPED, f"{what}; SLURM calls the job {ending.state}, and starts it again or not"
    if ending.step <= ending.first_step:
        in_vain = f"{what}; not started again: no step was gained since step {ending.first_step}"
        if outcome == "failed" and what == ending.former:
            return GIVEN_UP, f"{in_vain}, and the start before failed in the same words"
        if ending.starts >= STARTS_AT_A_STEP:
            least = "; ask for more time, or let it be asked earlier (--signal-seconds)" if ending.asked else ""
            return GIVEN_UP, f"{in_vain}, in {ending.starts} starts{least}"
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


def begin(run: Path, job: str, restarts: int, max_restarts: int, queued: Container[str] = ()) -> Path:
    """Note that a start of a job begins. Returns: the folder for its ranks' logs.

    Args:
        queued: jobs that wait or run.

    Raises:
        UserError: the job has been started too often, or in vain, or is not alone in its run folder.
    """
    if restarts > max_restarts:
        raise UserError(f"the job was started again {restarts} times, more than --max-restarts {max_restarts}")
    if others := [other for other in started_jobs(run) if other != job and other in queued]:
        raise UserError(f"run: the job {others[0]} of {run} waits or runs still; wait for it, or scancel {others[0]}")
    step, status = newest_step(run), read_status(run)
    if _starts_at(run, job, step) >= STARTS_AT_A_STEP:
        raise UserError(f"the job began {STARTS_AT_A_STEP} times at step {step} and gained none; see the logs in {run}")
    identity = None if status is None else [status.get(key) for key in _IDENTITY]
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    _note(run, job, restarts, {"event": "begin", "step": step, "status": identity, "nodes": nodes})
    logs = run / "log" / f"job_{job}_{restarts}"
    logs.mkdir(parents=True, exist_ok=True)
    return logs


def end(run: Path, job: str, restarts: int, max_restarts: int, state: str, asked: bool) -> tuple[int, str]:
    """What `decide` says of the start that `begin` has noted last; noted too."""
    began = _events(run, job, "begin")[-1]
    first = began["step"]
    starts = _starts_at(run, job, first)
    former = [line["what"] for line in _events(run, job, "end") if line["restarts"] == began["restarts"] - 1]
    status = read_status(run)
    if status is not None and [status.get(key) for key in _IDENTITY] == began["status"]:
        status = None  # an earlier start has left it
    repeated = former[-1] if former and starts > 1 else ""
    ending = Ending(first, newest_step(run), status, asked, restarts, max_restarts, state, starts, repeated)
    code, reason = decide(ending)
    facts = {"step": ending.step, "asked": asked, "again": code == AGAIN, "what": ending.what, "reason": reason}
    _note(run, job, restarts, {"event": "end", **facts})
    return code, reason


def read_lines(file: Path) -> list[dict[str, Any]]:
    """A file of JSON lines, without those that are torn: what writes them may be killed, or the disk full."""
    lines = []
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def append_line(file: Path, line: dict[str, Any]) -> None:
    """Add a line to a file of JSON lines; one that is torn stays one of its own.

    Raises:
        UserError: it can't be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as output:
            size = output.seek(0, os.SEEK_END)
            output.seek(max(size - 1, 0))
            torn = output.read(1) not in (b"", b"\n")
            output.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
    except OSError as error:
        raise UserError(f"run: cannot write {file}: {error.strerror}") from None


def started_jobs(run: Path) -> set[str]:
    """The jobs that have begun in a run folder, sent by `megacode submit` or by hand."""
    return {line["job"] for line in read_lines(_file(run)) if line["event"] == "begin"}


_IDENTITY = ("unix_time", "host", "pid")


def _file(run: Path) -> Path:
    return run / FOLDER / "starts.jsonl"


def _events(run: Path, job: str, event: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(_file(run)) if (line["job"], line["event"]) == (job, event)]


def _starts_at(run: Path, job: str, step: int) -> int:
    """How many of a job's last starts, one after the other, have begun at a step."""
    steps = [line["step"] for line in reversed(_events(run, job, "begin"))]
    return next((i for i, each in enumerate(steps) if each != step), len(steps))


def _note(run: Path, job: str, restarts: int, facts: dict[str, Any]) -> None:
    append_line(_file(run), {"unix_time": time.time(), "job": job, "restarts": restarts, **facts})


def main(arguments: list[str]) -> int:
    """What the batch script calls; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m megacode.submit.restarts", description=__doc__)
    parser.add_argument("moment", choices=["begin", "end"])
    parser.add_argument("--max-restarts", type=int, required=True)
    parser.add_argument("--asked", action="store_true", help="SLURM has asked the job to end")
    parser.add_argument("--queued", default="", help="what squeue prints of the user's jobs: their numbers")
    parser.add_argument("--state", default="", help="what squeue calls the job now")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    try:
        run = Path(recipes.load(options.recipe, options.overrides).run)
        job, restarts = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if options.moment == "begin":
            if "SLURM_ARRAY_JOB_ID" in os.environ:
                raise UserError("an array of jobs would train in one run folder at once; send one job for each run")
            print(begin(run, job, restarts, options.max_restarts, options.queued.split()))
            return 0
        code, reason = end(run, job, restarts, options.max_restarts, options.state, options.asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(reason, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
