"""What a run says of itself: a console line and a line of metrics.jsonl a step, and status.json."""

import json
import os
import resource
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


class Metrics:
    """Writes metrics.jsonl and the console. Lives on rank 0 only.

    Args:
        run: the run folder.
        step: the step that the run goes on from: lines of later steps (a run that died after its last checkpoint) go.
        num_steps: steps of the whole run, for the console.
    """

    def __init__(self, run: Path, step: int, num_steps: int) -> None:
        self.path, self.num_steps = run / "metrics.jsonl", num_steps
        self._keep(step)
        self.file = self.path.open("a", encoding="utf-8")
        self.first_step, self.started = step, time.monotonic()

    def _keep(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if len(kept) < len(lines):
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, self.path)

    def log(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl and of the console."""
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        print(self._line(values), flush=True)

    def _line(self, values: dict[str, Any]) -> str:
        head = f"step {values['step']:>{len(str(self.num_steps))}}/{self.num_steps}"
        if "validation_loss" in values:
            return f"{head}  validation loss {values['validation_loss']:.4f}"
        done = values["step"] - self.first_step
        left_seconds = (time.monotonic() - self.started) / done * (self.num_steps - values["step"])
        return (
            f"{head}  loss {values['loss']:.4f}  infilled {values['infilled_share']:.1%}  "
            f"norm {values['grad_norm']:.3f}  lr {values['learning_rate']:.2e}  "
            f"{values['tokens_per_second']:,.0f} tokens/s  {_clock(left_seconds)} left"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the device, or resident where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_status(run: Path, outcome: str, **values: Any) -> None:
    """Replace RUN/status.json: `running`, `finished` or `failed`, and what more is known."""
    status = {
        "outcome": outcome,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "unix_time": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": sys.argv,
        **values,
    }
    temporary = run / f"status.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, run / "status.json")


def fail_status(run: Path, rank: int, error: BaseException, checkpoint: Path | None) -> None:
    """Say that the run failed, unless another rank has: its reason came first, and this one may follow from it."""
    path = run / "status.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["outcome"] == "failed":
        return
    message = f"{type(error).__name__}: {error}"
    write_status(run, "failed", rank=rank, message=message, checkpoint=checkpoint and str(checkpoint))
