"""Run folders as a run leaves them, without training: deterministic, of any length, layout and mixture."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacode.plan.layout import fit
from support.training import recipe

START = 1_750_000_000.0
"""When the first start was, in Unix time."""
PHASES = {"forward": 0.27, "backward": 0.52, "communication": 0.12, "optimizer": 0.06, "data": 0.01, "other": 0.02}
GLOBAL_SAMPLES, LENGTH = 512, 4096


def write_run(
    folder: Path, steps: int = 500, planned: int | None = None, sources: Sequence[str] = ("python", "c"),
    layout: tuple[int, int, int] = (4, 2, 2), virtual_stages: int = 1, context: int = 1, micro_samples: int = 4,
    per_host: int = 8,
    outcome: str = "finished", message: str | None = None, restarts: Sequence[int] = (), spoiled: Sequence[int] = (),
    validate_every: int = 50, phases: bool = True, settings: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write a run folder.

    Args:
        folder: made where it is missing.
        steps: lines of metrics.
        planned: steps of the schedule; left out, `steps`.
        sources: of the mixture, in falling shares.
        layout: pipeline x data x tensor ranks.
        virtual_stages: chunks a pipeline rank.
        context: context ranks; with several, tensor ranks share the sequence, and blocks are recomputed.
        micro_samples: sequences of a micro-batch.
        per_host: processes of a host.
        outcome: of status.json.
        message: of status.json.
        restarts: steps that the run was started again at.
        spoiled: steps whose loss and norm are not finite: null, and the update skipped.
        validate_every: steps between validations.
        phases: record the phases of a step.
        settings: sections of the recipe, merged over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipeline, data, tensor = layout
    sharing = {"context": context, "sequence": True, "recompute": "full"} if context > 1 else {}
    config = recipe(
        run=str(folder),
        precision="bf16",
        model={"preset": "code-llama-7b", "hidden": 4096, "ffn": 11008, "vocabulary": 32016},
        parallel={"pipeline": pipeline, "tensor": tensor, "virtual_stages": virtual_stages, "zero": 1, **sharing},
        batch={"global_samples": GLOBAL_SAMPLES, "micro_samples": micro_samples, "sequence_length": LENGTH},
        optimizer={"learning_rate": 3e-4, "clip": 1.0},
        schedule={"steps": planned or steps, "warmup_steps": min(100, (planned or steps) // 10)},
        **(settings or {}),
    )
    config.save(folder / "recipe.yaml")
    fitted = fit(config, pipeline * data * context * tensor)
    seconds = 4.2
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for line in _metrics(steps, planned or steps, sources, seconds, spoiled, validate_every, phases):
            file.write(json.dumps(line) + "\n")
    hosts = {f"node{n:03d}": per_host for n in range(fitted.world_size // per_host)} or {"node000": fitted.world_size}
    starts = [
        {
            "unix_time": START + 1.1 * step * seconds,
            "step": step,
            "checkpoint": str(folder / "checkpoints" / f"step_{step:08d}") if step else None,
            "world_size": fitted.world_size,
            "hosts": hosts,
            "device": "NVIDIA H100 80GB HBM3",
            "layout": {
                "pipeline": pipeline, "data": data, "tensor": tensor, "virtual_stages": virtual_stages,
                "num_micro_batches": fitted.num_micro_batches,
                "stages": [[stage.start, stage.stop] for stage in fitted.stages], **sharing,
            },
            "num_parameters": 6_738_546_688,
            "peak_teraflops": 989.0,
            "backends": {"attention": "flash-attn", "rope": "triton", "rms_norm": "torch", "cross_entropy": "torch"},
            "versions": {"python": "3.11.9", "megacode": "0.1.0", "torch": "2.11.0", "deepspeed": "0.19.8"},
            "command": ["launchers/train.py", "recipes/seven.yaml", "schedule.steps=2000"],
        }
        for step in (0, *restarts)
    ]  # fmt: skip
    _write_lines(folder / "starts.jsonl", starts)
    saved = [*restarts, *([steps] if outcome == "finished" else [])]
    events = [
        _event(START + 1.1 * step * seconds, step, "checkpoint", folder=f"checkpoints/step_{step:08d}")
        for step in saved
    ]
    events += [_event(START + 1.1 * step * seconds, step, "skip", text=f"step {step}: loss nan") for step in spoiled]
    if outcome == "failed":
        events.append(_event(START + 1.1 * steps * seconds, steps, "failure", text=message))
    _write_lines(folder / "events.jsonl", sorted(events, key=lambda event: event["step"]))
    for step in saved:
        _checkpoint(folder / "checkpoints" / f"step_{step:08d}", step, fitted.world_size)
    status = {
        "outcome": outcome,
        "unix_time": START + 1.1 * steps * seconds,
        "host": "node000",
        "pid": 4711,
        "step": steps,
    }
    if message is not None:
        status |= {"rank": 3, "message": message}
    if outcome == "finished":
        status["memory_bytes"] = [int((50 + rank % 7) * 2**30) for rank in range(fitted.world_size)]
    (folder / "status.json").write_text(json.dumps(status, indent=1) + "\n", encoding="utf-8")
    return folder


def _metrics(
    steps: int, planned: int, sources: Sequence[str], seconds: float, spoiled: Sequence[int], validate_every: int,
    phases: bool,
) -> Any:  # fmt: skip
    noise = random.Random(0)
    tokens = GLOBAL_SAMPLES * LENGTH
    shares = [0.5 ** (n / 2) for n in range(len(sources))]
    warm_up = min(100, planned // 10)
    for step in range(1, steps + 1):
        base = 1.1 + 9.2 * math.exp(-step / 40) + 3.2 * (step + 20) ** -0.3 + noise.gauss(0, 0.03)
        took = seconds * (1 + abs(noise.gauss(0, 0.02)))
        rate = 3e-4 * (step / warm_up if step < warm_up else 0.5 + 0.5 * math.cos(math.pi * step / planned))
        values = {name: base + 0.25 * n - 0.3 + noise.gauss(0, 0.04) for n, name in enumerate(sources)}
        labels = {name: round(tokens * share / sum(shares)) for name, share in zip(sources, shares, strict=True)}
        lost = step in spoiled
        line = {
            "step": step,
            "tokens": step * tokens,
            "loss": None if lost else base,
            "loss_plain": None if lost else base - 0.08,
            "loss_infilled": None if lost else base + 0.35,
            "loss_by_source": dict.fromkeys(sources) if lost else values,
            "labels_by_source": labels,
            "infilled_share": 0.31 + noise.gauss(0, 0.01),
            "grad_norm": None if lost else 0.35 + 30 * math.exp(-step / 15) + abs(noise.gauss(0, 0.06)),
            "learning_rate": rate,
            "skipped": lost,
            "step_seconds": took,
            "tokens_per_second": tokens / took,
            "mfu": 0.42 * seconds / took,
            "memory_bytes": int(61.3 * 2**30 + min(step, 5) * 2**28),
        }
        if phases:
            line["phases"] = {name: share * took * (1 + noise.gauss(0, 0.03)) for name, share in PHASES.items()}
        yield line
        if step % validate_every == 0:
            yield {"step": step, "validation_loss": base + 0.02, "validation_tokens": 1_048_576}


def _event(unix_time: float, step: int, event: str, **values: Any) -> dict[str, Any]:
    more = {"seconds": 21.4, "bytes": 94_000_000_000} if event == "checkpoint" else {}
    return {"unix_time": unix_time, "step": step, "event": event, **more, **values}


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _checkpoint(folder: Path, step: int, world_size: int) -> None:
    folder.mkdir(parents=True)
    kinds = ("weights", "optimizer")
    files = {f"{kind}_{rank:05d}.safetensors": {"bytes": 1_700_000_000} for rank in range(world_size) for kind in kinds}
    manifest = {"format": 1, "progress": {"step": step}, "files": files, "tensors": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
