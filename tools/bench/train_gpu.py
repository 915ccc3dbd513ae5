"""`python -m megacode.tools.bench.train_gpu`: training on one GPU, megacode and transformers one after the other."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from megacode.errors import UserError
from megacode.plan.hardware import HARDWARE, peak_teraflops
from megacode.plan.layout import fit
from megacode.plan.memory import recipe_job, worst_stage
from megacode.plan.model import flops_per_token, num_parameters
from megacode.plan.search import Choice, apply, search
from megacode.plan.units import GIB
from megacode.recipe import ModelSection, Recipe
from megacode.tools.bench import ours, peers
from megacode.tools.bench.contest import SEED
from megacode.tools.bench.corpus import write_shards, write_tokenizer
from megacode.tools.bench.processes import Figures, Team, command_line, resident_peak
from megacode.tools.output import JsonFile, json_output

MODELS: dict[str, dict[str, Any]] = {
    "7b": {"preset": "code-llama-7b"},
    # 1.4 billion, of the family's shape.
    "1b": {"layers": 24, "hidden": 2048, "heads": 16, "kv_heads": 16, "ffn": 5632, "vocabulary": 32016,
           "rope_theta": 1e6, "max_positions": 16384},
    "13b": {"preset": "code-llama-13b"},
    # 0.2 million: the tool's own test.
    "nano": {"preset": "nano", "vocabulary": 1024},
}  # fmt: skip
LENGTHS = {"7b": [4096, 16384], "1b": [4096, 16384], "13b": [4096, 16384], "nano": [128]}
FORMULA = "6 (N - V h) + 6 L h s floating-point operations a token (causal: s / 2 keys a token on average)"
WARM_UP = 2
"""Steps that do not count: kernels are compiled and memory is asked for."""
MEMORY_SHARE = 0.92
"""Of the device's memory that the plan may fill: the rest is CUDA's context and fragmentation."""
LOSS_TOLERANCE = 2e-2
"""Largest relative difference of the first losses: one computes in bf16 and the other under autocast."""
ANSWER_SECONDS = 240.0


@dataclass(frozen=True)
class Device:
    """What is measured on."""

    kind: str
    """cuda or cpu"""
    name: str
    memory_bytes: int
    matmul_teraflops: float
    """Attained in this run by a large matmul in bf16."""
    peak_teraflops: float | None
    """The data sheet's; None where it is not known."""
    versions: dict[str, str]


@dataclass(frozen=True)
class Row:
    """What was measured of a contestant."""

    model: str
    sequence_length: int
    contestant: str
    parameters: int
    micro_samples: int
    global_samples: int
    zero: int | None
    """None: a peer, in one process."""
    recompute: str
    planned_bytes: int | None
    """By the plan's formula."""
    peak_bytes: int
    tokens_per_second: Figures
    """Median, lowest and highest over the steps after the warm-up; data, update and logging included."""
    flops_per_token: int
    mfu: float | None
    """Of the data sheet's peak."""
    mfu_of_matmul: float
    """Of what a large matmul attained."""
    losses: list[float]


Builder = Callable[[Recipe, str], Callable[[], float]]
"""(recipe, device) -> a step, which returns its loss."""


def liger_peer(recipe: Recipe, device: str) -> Callable[[], float]:
    """transformers with Liger's kernels."""
    return peers.on_shards(recipe, device, liger=True)


def plain_peer(recipe: Recipe, device: str) -> Callable[[], float]:
    """transformers alone."""
    return peers.on_shards(recipe, device, liger=False)


def peer_of(device: str) -> tuple[str, Builder]:
    """The peer's name and builder."""
    if device == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        return "transformers + Liger", liger_peer
    return "transformers", plain_peer


def recipe_of(model: str, sequence_length: int, step_tokens: int, folder: Path) -> Recipe:
    """A training of a model in bf16 on one device, its memory's policies not chosen yet."""
    return Recipe.model_validate(
        {
            "run": str(folder / "run"),
            "seed": SEED,
            "model": MODELS[model],
            "tokenizer": {"path": str(folder / f"{model}.model")},
            # Both contestants read in their own process: a benchmark's processes may have no children.
            "data": {"train": str(folder / model), "workers": 0},
            "batch": {
                "global_samples": max(1, step_tokens // sequence_length),
                "micro_samples": 1,
                "sequence_length": sequence_length,
            },
            "optimizer": {"learning_rate": 1e-4},
            "schedule": {"steps": 10**6, "warmup_steps": 0},
        }
    )


def choose(recipe: Recipe, device: Device) -> Choice | str:
    """The quickest micro-batch, recomputation and ZeRO stage that fit the device by the plan, or why none does."""
    hardware = next((value for key, value in HARDWARE.items() if key in device.name), HARDWARE["H100"])
    found = search(recipe, 1, MEMORY_SHARE * device.memory_bytes, hardware)
    fitting = [choice for choice in found.fitting if choice.cost.job.offload == "none"]
    if fitting:
        return fitting[0]
    least = apply(recipe, {"parallel": {"zero": 2, "reduce": "microbatch", "recompute": "full"}})
    needed = worst_stage(recipe_job(least, fit(least, 1))).total_bytes
    return (
        f"with ZeRO-2, full recomputation and micro-batches of one sample it needs {needed / GIB:.0f} GiB, and of the "
        f"device's {device.memory_bytes / GIB:.0f} the plan may fill {MEMORY_SHARE:.0%}"
    )


def serve_device(kind: str) -> Callable[[str, int], Device]:
    """What a process serves that looks at the device: a large matmul's speed is the median of so many."""
    import torch

    from megacode.train.metrics import package_versions

    def look(request: str, count: int) -> Device:
        cuda = kind == "cuda"
        size = 8192 if cuda else 512
        x = torch.randn(size, size, device=kind, dtype=torch.bfloat16)
        wait = torch.cuda.synchronize if cuda else lambda: None
        seconds: list[float] = []
        for _ in range(count):
            wait()
            started = time.perf_counter()
            for _ in range(10):
                torch.mm(x, x)
            wait()
            seconds.append((time.perf_counter() - started) / 10)
        versions = package_versions()
        versions["transformers"] = metadata.version("transformers")
        name = torch.cuda.get_device_name() if cuda else "CPU"
        memory = torch.cuda.get_device_properties(0).total_memory if cuda else 8 * GIB
        speed = 2 * size**3 / median(seconds) / 1e12
        return Device(kind, name, memory, speed, peak_teraflops(name) if cuda else None, versions)

    return look


def serve(builder: Builder, recipe: Recipe, kind: str) -> Callable[[str, int], Any]:
    """What a contestant's process serves: "train" so many steps, "memory"."""
    import torch

    step = builder(recipe, kind)

    def answer(request: str, count: int) -> Any:
        if request == "memory":
            return torch.cuda.max_memory_allocated() if kind == "cuda" else resident_peak()
        losses, seconds = [], []
        for _ in range(count):
            started = time.perf_counter()
            losses.append(step())  # waits for the device: its loss is a number
            seconds.append(time.perf_counter() - started)
        return losses, seconds

    return answer


def measure(
    name: str, model: str, builder: Builder, recipe: Recipe, device: Device, planned: int | None, steps: int
) -> Row:
    """Train in a process of its own.

    Raises:
        RuntimeError: the process failed.
    """
    shutil.rmtree(recipe.run, ignore_errors=True)
    team = Team(serve, (builder, recipe, device.kind), 1, 2, ANSWER_SECONDS, device.kind)
    try:
        turns = [team.train(1) for _ in range(WARM_UP + steps)]
        peak = team.ask("memory", 0)[0]
    finally:
        team.stop()
    batch, parallel = recipe.batch, recipe.parallel
    rates = [batch.global_samples * batch.sequence_length / turn.seconds[0] for turn in turns[WARM_UP:]]
    middle = median(rates)
    flops = flops_per_token(recipe.model, batch.sequence_length)
    return Row(
        model=model, sequence_length=batch.sequence_length, contestant=name, parameters=num_parameters(recipe.model),
        micro_samples=batch.micro_samples, global_samples=batch.global_samples,
        zero=parallel.zero if planned is not None else None,
        recompute=parallel.recompute if planned is not None else "full" if parallel.recompute != "none" else "none",
        planned_bytes=planned, peak_bytes=peak, tokens_per_second=(middle, min(rates), max(rates)),
        flops_per_token=flops,
        mfu=device.peak_teraflops and middle * flops / (device.peak_teraflops * 1e12),
        mfu_of_matmul=middle * flops / (device.matmul_teraflops * 1e12), losses=[turn.losses[0] for turn in turns],
    )  # fmt: skip


@dataclass
class Report:
    """What the tool has found so far."""

    device: Device
    rows: list[Row] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)

    @property
    def values(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {"formula": FORMULA, **dataclasses.asdict(self)}


def run_case(report: Report, model: str, recipe: Recipe, steps: int) -> None:
    """Both contestants on one model and sequence length; what fails goes to the report."""
    device, length = report.device, recipe.batch.sequence_length
    chosen = choose(recipe, device)
    if isinstance(chosen, str):
        report.skipped.append(f"{model} at {length:,}: {chosen}")
        _progress(f"skipped {report.skipped[-1]}")
        return
    recipe = apply(recipe, chosen.changes)
    own = _try(report, model, "megacode", ours.trainer, recipe, chosen.worst.total_bytes, steps)
    name, builder = peer_of(device.kind)
    peer = _try(report, model, name, builder, recipe, None, steps)
    if own and peer and not abs(own.losses[0] - peer.losses[0]) <= LOSS_TOLERANCE * abs(peer.losses[0]):
        report.failed.append(f"{model} at {length:,}: the first losses {own.losses[0]} and {peer.losses[0]} differ")


def _try(
    report: Report, model: str, name: str, builder: Builder, recipe: Recipe, planned: int | None, steps: int
) -> Row | None:
    """Measure one contestant; a peer, whose memory no plan knows, with half the micro-batch where it is too much."""
    parallel, batch = recipe.parallel, recipe.batch
    where = f"{model} at {batch.sequence_length:,}, {name}"
    own = "" if planned is None else f", ZeRO-{parallel.zero}, {planned / GIB:.1f} GiB planned"
    _progress(
        f"{where}: {batch.global_samples} samples a step in micro-batches of {batch.micro_samples}, recompute "
        f"{parallel.recompute}{own}"
    )
    try:
        row = measure(name, model, builder, recipe, report.device, planned, steps)
    except RuntimeError as error:
        _progress(str(error))
        if planned is None and batch.micro_samples > 1 and "out of memory" in str(error).lower():
            smaller = apply(recipe, {"batch": {"micro_samples": batch.micro_samples // 2}})
            return _try(report, model, name, builder, smaller, None, steps)
        report.failed.append(f"{where}: {str(error).strip().splitlines()[-1]}")
        return None
    report.rows.append(row)
    return row


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"{', '.join(MODELS)}; may be repeated.")] = None,
    sequence_length: Annotated[list[int] | None, typer.Option(min=1, help="Tokens; may be repeated.")] = None,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one optimizer step.")] = 65_536,
    steps: Annotated[int, typer.Option(min=1, help=f"Steps that are measured, after {WARM_UP} to warm up.")] = 5,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the tool itself.")] = "cuda",
    minutes: Annotated[float, typer.Option(min=0, help="No further model is begun after so many.")] = 7.5,
    json_file: JsonFile = None,
) -> None:
    """Train models in bf16 on one GPU with megacode's own loop and with transformers (and Liger, where installed).

    Random tokens in real shards; micro-batch, recomputation and ZeRO stage are the quickest that fit by the plan.
    Prints tokens/s with data and update, MFU and peak memory. Exit code 1 where a contestant failed.

    Example: python -m megacode.tools.bench.train_gpu --model 7b --json figures.json
    """
    for name in model or []:
        if name not in MODELS:
            raise UserError(f"--model {name} is unknown; known are {', '.join(MODELS)}")
    trainings = [(name, length) for name in model or ["7b", "1b", "13b"] for length in sequence_length or LENGTHS[name]]
    for name, length in trainings:
        most = ModelSection.model_validate(MODELS[name]).max_positions
        if not length <= min(most, step_tokens):
            raise UserError(f"--sequence-length {length}: at most {most} for {name}, and --step-tokens ({step_tokens})")
    started = time.monotonic()
    with json_output(json_file) as write, tempfile.TemporaryDirectory() as folder:
        report = Report(_look_at(device))
        _progress(
            f"{report.device.name}, {report.device.memory_bytes / GIB:.1f} GiB; a large matmul attains "
            f"{report.device.matmul_teraflops:.3g} TFLOP/s"
        )
        for name in dict(trainings):
            _write_data(Path(folder), name, (WARM_UP + steps + 1) * step_tokens)
        for name, length in trainings:
            if time.monotonic() - started > 60 * minutes:
                report.skipped.append(f"{name} at {length:,}: no time is left (--minutes {minutes:g})")
                continue
            run_case(report, name, recipe_of(name, length, step_tokens, Path(folder)), steps)
            write(report.values, whole=False)  # a run may be ended from outside
        write(report.values)
        print(table(report))
    if report.failed or not report.rows:
        raise RuntimeError("; ".join(report.failed) or "nothing was measured")


def _look_at(kind: str) -> Device:
    """The device, seen from a process of its own: this one must not hold memory of it."""
    if kind not in ("cuda", "cpu"):
        raise UserError(f"--device {kind} is unknown; say cuda or cpu")
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                "there is no CUDA device that torch sees; --device cpu tries the tool on a tiny --model nano"
            )
    team = Team(serve_device, (kind,), 1, 2, ANSWER_SECONDS, kind)
    found: Device = team.ask("look", 9)[0]
    team.stop()
    return found


def _write_data(folder: Path, model: str, num_tokens: int) -> None:
    from megacode.data.tokenizer import Tokenizer

    vocabulary = recipe_of(model, 1, 1, folder).model.vocabulary
    assert vocabulary is not None
    write_tokenizer(folder / f"{model}.model", vocabulary)
    write_shards(folder / model, Tokenizer(folder / f"{model}.model"), num_tokens)


def table(report: Report) -> str:
    """Markdown: a line a contestant, what was left out, and how MFU is counted."""
    head = ["model", "tokens", "contestant", "samples a step x micro-batch", "recompute", "tokens/s, median (lowest, "
            "highest)", "MFU", "of the matmul's speed", "peak GiB (planned)"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in report.rows:
        middle, low, high = row.tokens_per_second
        planned = "" if row.planned_bytes is None else f" ({row.planned_bytes / GIB:.1f})"
        zero = "" if row.zero is None else f", ZeRO-{row.zero}"
        cells = [
            row.model, f"{row.sequence_length:,}", row.contestant + zero, f"{row.global_samples} x {row.micro_samples}",
            row.recompute, f"{middle:,.0f} ({low:,.0f}, {high:,.0f})", "" if row.mfu is None else f"{row.mfu:.1%}",
            f"{row.mfu_of_matmul:.1%}", f"{row.peak_bytes / GIB:.1f}{planned}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    device = report.device
    peak = "not known" if device.peak_teraflops is None else f"{device.peak_teraflops:g} TFLOP/s"
    lines += ["", *(f"skipped: {text}" for text in report.skipped), *(f"FAILED: {text}" for text in report.failed)]
    lines.append(f"MFU: tokens/s x {FORMULA}, over the peak ({peak}) and over a bf16 matmul's "
                 f"{device.matmul_teraflops:.3g} TFLOP/s in this run")  # fmt: skip
    if peer_of(device.kind)[0] == "transformers":
        why = "Liger is not installed" if device.kind == "cuda" else "Liger needs a GPU"
        lines.append(f"{why}: the peer is transformers alone")
    return "\n".join([*lines, f"{device.name}; {', '.join(f'{k} {v}' for k, v in device.versions.items())}"])


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line(main)
