"""Figures of a run: a step's line of metrics, status.json, and what a start was made on."""

import json
import os
import platform
import resource
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megacode.plan.hardware import peak_teraflops
from megacode.plan.layout import Layout
from megacode.plan.model import num_parameters
from megacode.recipe import Recipe

FAILED = ".failed"
"""Made in the run folder by the first rank that fails: only one can make it."""

PACKAGES = ("megacode", "torch", "deepspeed", "triton", "numpy", "flash-attn", "flash-attn-3", "apex",
            "liger-kernel")  # fmt: skip


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the device, or resident where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_peak_teraflops(recipe: Recipe, device: torch.device) -> float | None:
    """What MFU is measured against: the recipe's figure, else the device's where it is known."""
    if recipe.logging.peak_teraflops is not None:
        return recipe.logging.peak_teraflops
    return peak_teraflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def split_losses(sums: list[float], counts: list[float], sources: tuple[str, ...]) -> dict[str, Any]:
    """Mean losses and numbers of labels of a step, told apart.

    Args:
        sums: of group 2 * source + infilled, the summed negative log-likelihood.
        counts: of the same groups, how many labels.
        sources: names of the sources.
    """

    def mean(groups: range) -> float | None:
        count = sum(counts[group] for group in groups)
        return sum(sums[group] for group in groups) / count if count else None

    groups = len(sums)
    labels = {name: int(counts[2 * i] + counts[2 * i + 1]) for i, name in enumerate(sources)}
    return {
        "loss": mean(range(groups)),
        "loss_plain": mean(range(0, groups, 2)),
        "loss_infilled": mean(range(1, groups, 2)),
        "loss_by_source": {name: mean(range(2 * i, 2 * i + 2)) for i, name in enumerate(sources)},
        "labels_by_source": labels,
        "infilled_share": sum(counts[1::2]) / max(sum(counts), 1),
    }


def count_figures(documents: dict[str, int]) -> dict[str, Any]:
    """What became of a step's documents, and the share of those that lay uncut which became infilling documents."""
    uncut = documents["uncut"]
    return {"documents": documents, "infilled_documents": documents["infilled"] / uncut if uncut else None}


def validation_figures(loss_sum: float, num_labels: int) -> dict[str, Any]:
    """Mean loss of a validation; None where loss spans leave nothing of the samples that were looked at."""
    return {"validation_loss": loss_sum / num_labels if num_labels else None, "validation_tokens": num_labels}


def package_versions() -> dict[str, str]:
    """Those of PACKAGES that are installed."""
    versions = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def start_facts(recipe: Recipe, layout: Layout, device: torch.device, hosts: list[str], step: int,
                checkpoint: Path | None, backends: dict[str, str]) -> dict[str, Any]:  # fmt: skip
    """A line of starts.jsonl: what the run goes on from, and on what."""
    return {
        "unix_time": time.time(),
        "step": step,
        "checkpoint": checkpoint and str(checkpoint),
        "world_size": layout.world_size,
        "hosts": dict(Counter(hosts)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "layout": {
            **asdict(layout),
            "stages": [[stage.start, stage.stop] for stage in layout.stages],
            "sequence": recipe.parallel.sequence,
            "recompute": recipe.parallel.recompute,
        },
        "num_parameters": num_parameters(recipe.model),
        "peak_teraflops": device_peak_teraflops(recipe, device),
        "backends": backends,
        "versions": {"python": platform.python_version(), **package_versions()},
        "command": sys.argv,
    }


def append_start(run: Path, facts: dict[str, Any]) -> None:
    """Add a line to RUN/starts.jsonl."""
    with (run / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def append_event(run: Path, event: str, step: int | None, text: str, **values: Any) -> None:
    """Add a line to RUN/events.jsonl, from any rank."""
    line = {"unix_time": time.time(), "step": step, "event": event, "text": text, **values}
    with (run / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def write_status(run: Path, outcome: str, **values: Any) -> None:
    """Replace RUN/status.json: `running`, `finished`, `stopped` or `failed`, and what more is known.

    Once a rank has failed, that stays.
    """
    if outcome != "failed" and (run / FAILED).exists():
        return
    status = {
        "outcome": outcome,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "unix_time": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": sys.argv,
        **values,
    }
    temporary = run / f"status.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        temporary.write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, run / "status.json")
    except OSError as error:
        error.filename = str(run / "status.json")  # what could not be written: the error of a write names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def begin_status(run: Path) -> None:
    """Say that the run is running, and that no rank has failed yet."""
    (run / FAILED).unlink(missing_ok=True)
    write_status(run, "running")


def fail_status(
    run: Path, rank: int, message: str, checkpoint: Path | None, start: str, step: int | None = None
) -> bool:
    """Say that the run failed, unless another rank has: its reason came first, and this one may follow from it.

    Args:
        rank: the one to blame.
        step: the last one that is done.
        start: names this start of the run; `has_failed` asks for it.

    Returns:
        Whether this rank is the first.

    Raises:
        OSError: nobody can say so, or `status.json` can't be written.
    """
    first = claim_failure(run, start)
    if first:
        write_status(run, "failed", rank=rank, message=message, step=step, checkpoint=checkpoint and str(checkpoint))
    return first


def claim_failure(run: Path, start: str) -> bool:
    """Whether this rank is the first of this start to fail; only one gets to hear so.

    Raises:
        OSError: the file that says so can't be made.
    """
    try:
        with (run / FAILED).open("xb", buffering=0) as file, suppress(OSError):  # no room: it is there, though
            file.write(start.encode())
    except FileExistsError:
        return False
    return True


def read_outcome(run: Path) -> str | None:
    """The outcome that status.json tells; None where there is none."""
    try:
        outcome: str = json.loads((run / "status.json").read_text(encoding="utf-8"))["outcome"]
    except (OSError, ValueError, KeyError):
        return None
    return outcome


def read_message(run: Path) -> str:
    """What status.json says of the end of a run; empty where it says nothing."""
    try:
        message: str = json.loads((run / "status.json").read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError, KeyError):
        return ""
    return message


def has_failed(run: Path, start: str) -> bool:
    """Whether a rank of this start has failed. A network file system may still show what an earlier start left."""
    try:
        return (run / FAILED).read_text(encoding="utf-8") == start
    except OSError:
        return False
