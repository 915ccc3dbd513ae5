"""`python -m megacode.tools.bench.kernels`: every kernel and its rivals on one device, in one run of random numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacode.errors import UserError
from megacode.tools.bench.processes import command_line
from megacode.tools.output import JsonFile, json_output

if TYPE_CHECKING:
    import torch

    from megacode.tools.bench.kernel_cases import Case, Function

WRONG = {"bfloat16": 3e-2, "float32": 1e-4}
"""A result farther than this from plain torch's in fp32, over the largest value, is no result."""


BUSY_CYCLES = 2_000_000
"""About a millisecond of a GPU's clock: longer than the host takes for any call here."""


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured in the same run."""

    copy_terabytes: float
    """Per second, read and written."""
    matmul_teraflops: float


@dataclass(frozen=True)
class Row:
    """A pass of an operation by someone."""

    operation: str
    size: str
    by: str
    direction: str
    """forward; backward; or both, where one pass does both."""
    milliseconds: float | None
    """Median; None: it was not measured, and `note` says why."""
    rate: float | None
    """TB/s of the bytes that must move, or TFLOP/s of what must be computed."""
    unit: str
    share: float | None
    """Of the measured ceiling."""
    chosen: bool
    """Whether `auto` takes it."""
    note: str = ""


def main(
    operation: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Other numbers of tokens; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    json_file: JsonFile = None,
    png: Annotated[Path | None, typer.Option(help="Draw the rates into this file.")] = None,
) -> None:
    """Time every kernel forward and backward: this trainer's, eager and compiled torch, and the packages that are here.

    Example: python -m megacode.tools.bench.kernels --json kernels.json --png kernels.png
    """
    import torch

    from megacode.tools.bench import kernel_cases

    unknown = [name for name in operation or [] if name not in kernel_cases.OPERATIONS]
    if unknown:
        raise UserError(f"--operation {unknown[0]} is unknown; known are {', '.join(kernel_cases.OPERATIONS)}")
    if device not in ("cuda", "cpu") or precision not in ("bf16", "fp32"):
        raise UserError("--device is cuda or cpu, --precision bf16 or fp32")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; give --device cpu with few --tokens to try the tool")
    where, dtype = torch.device(device), {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if png is not None and not png.absolute().parent.is_dir():
        raise UserError(f"--png: {png.parent} is no folder; make it, or name another file")
    with json_output(json_file) as write:
        facts, ceilings = _facts(where, precision), measure_ceilings(where, dtype)
        copy, products = _rate(ceilings.copy_terabytes, "TB/s"), _rate(ceilings.matmul_teraflops, "TFLOP/s")
        print(f"{facts['device']}, {precision}, {', '.join(f'{k} {v}' for k, v in facts['versions'].items())}")
        print(f"measured here: copy {copy.strip()}, matmul {products.strip()}", flush=True)
        rows: list[Row] = []
        lines: set[str] = set()
        for case in kernel_cases.cases(where, dtype, tokens, operation):
            for row in measure(case, ceilings):
                rows.append(row)
                line = _line(row)
                if line not in lines:  # why somebody is missing, once an operation
                    print(line, flush=True)
                lines.add(line)
            # The next case may need more memory than there is.
            write(facts | {"ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows]}, whole=False)
        write(facts | {"ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows]})
    if png is not None:
        draw(rows, ceilings, facts["device"], png)


def measure(case: Case, ceilings: Ceilings) -> list[Row]:
    """Rows of everyone who computes a case."""
    from megacode.kernels.dispatch import TABLE, choose
    from megacode.tools.bench.kernel_cases import subjects

    rows: list[Row] = []
    chosen = choose(case.operation, case.task).name if case.operation in TABLE else None
    for name, function in subjects(case).items():
        times: dict[str, float] = {}
        try:
            if isinstance(function, str):
                note = function
            elif not (note := "" if name == "products" else _wrong(case, function)):  # which are no loss
                times = _times(case, function)
                note = _weight(case, function) if case.weighed else ""
        except Exception as error:  # a rival that fails is a finding, not the end of the run
            note, times = f"fails: {' '.join(str(error).split())[:200]}", {}
        rows += [_row(case, name, way, times.get(way), ceilings, name == chosen, note) for way in _ways(case)]
    return rows


def _ways(case: Case) -> list[str]:
    return ["both"] if case.backward is None else ["forward", "backward"]


def _row(
    case: Case, by: str, direction: str, milliseconds: float | None, ceilings: Ceilings, chosen: bool, note: str
) -> Row:
    cost = case.backward if direction == "backward" else case.forward
    assert cost is not None
    unit, amount, ceiling = "TFLOP/s", cost.flops, ceilings.matmul_teraflops
    if not cost.flops:
        unit, amount, ceiling = "TB/s", cost.bytes, ceilings.copy_terabytes
    rate = None if milliseconds is None else amount / milliseconds / 1e9
    share = None if rate is None else rate / ceiling
    return Row(case.operation, case.size, by, direction, milliseconds, rate, unit, share, chosen, note)


def _times(case: Case, function: Function) -> dict[str, float]:
    """Milliseconds of each pass."""
    import torch

    arguments, device = case.arguments(), case.task.device
    leaves = _edges(arguments)
    if case.backward is None:
        gradient = torch.ones_like(function(*arguments))
        return {"both": timed(lambda: torch.autograd.grad(function(*arguments), leaves, gradient), device)}
    if case.operation == "rope":  # in place, so not on what records gradients; it keeps nothing for them either
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in case.arguments()]
        forward = timed(lambda: function(*plain), device)
    else:
        forward = timed(lambda: function(*arguments), device)
    result = function(*arguments)
    outputs = list(result) if isinstance(result, tuple) else [result]
    gradients = [torch.randn_like(x) for x in outputs]
    backward = timed(lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True), device)
    return {"forward": forward, "backward": backward}


def _weight(case: Case, function: Function) -> str:
    """What a call takes at its peak beyond its arguments, on CUDA, beside the bytes of whole logits."""
    import torch

    if case.task.device.type != "cuda":
        return "peak memory: on CUDA only"
    arguments = case.arguments()
    edges = _edges(arguments)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function(*arguments)
    torch.autograd.grad(result, edges, torch.ones_like(result))
    peak = torch.cuda.max_memory_allocated() - before
    gradients = sum(x.nbytes for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad)
    logits = arguments[0].shape[0] * arguments[1].shape[0] * case.task.dtype.itemsize
    return f"peak {peak / 2**20:.0f} MiB, gradients {gradients / 2**20:.0f}, whole logits {logits / 2**20:.0f}"


def timed(function: Callable[[], Any], device: torch.device, repetitions: int = 10) -> float:
    """Median milliseconds of a call."""
    if device.type == "cuda":
        return _timed_on_cuda(function, 3 * repetitions)
    times = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def _timed_on_cuda(function: Callable[[], Any], repetitions: int) -> float:
    """By events on the device, with the L2 cache overwritten before each call.

    Before each the device is kept busy while the host enqueues it: a kernel of 30 us is shorter than its launch.
    """
    import torch

    for _ in range(3):
        function()
    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for start, end in marks:
        cache.zero_()
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def _edges(arguments: list[Any]) -> list[Any]:
    """What is differentiated, as it is now: in place it becomes something else."""
    import torch
    from torch.autograd.graph import get_gradient_edge

    return [get_gradient_edge(x) for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]


def _results(case: Case, function: Function, wide: bool = False) -> list[torch.Tensor]:
    """Of the same numbers at every call, in fp32 if `wide`."""
    import torch

    torch.manual_seed(0)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in case.arguments()]
    if wide:
        arguments = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    result = function(*arguments)
    return list(result) if isinstance(result, tuple) else [result]


def _wrong(case: Case, function: Function) -> str:
    """What is wrong with somebody's forward, if anything: who computes something else is not timed.

    Row by row, since attention's outputs are the smaller the more tokens they are means of.
    """
    for mine, right in zip(_results(case, function), _results(case, case.exact, wide=True), strict=True):
        right = right.sum()[None] if mine.dim() == 0 else right  # Liger gives a sum of losses
        mine = mine.reshape(right.shape).float()
        error = float(((mine - right).abs().amax(-1) / right.abs().amax(-1)).max())
        if not error <= WRONG[str(case.task.dtype).removeprefix("torch.")]:
            return f"WRONG: off by {error:.1e} of a row's largest value"
    return ""


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A copy of tensors far larger than caches, and products of square matrices."""
    import torch

    size, side = (2**30, 8192) if device.type == "cuda" else (2**25, 512)
    source = torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / timed(lambda: target.copy_(source), device) / 1e9
    square = torch.randn(side, side, dtype=dtype, device=device)
    return Ceilings(copy, 2 * side**3 / timed(lambda: square @ square, device) / 1e9)


def _facts(device: torch.device, precision: str) -> dict[str, Any]:
    import platform

    import torch

    from megacode.train.metrics import package_versions

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {"device": name, "precision": precision, "versions": package_versions()}


def _line(row: Row) -> str:
    head = f"{row.operation:<14} {row.size:<36} {row.by:<13} {row.direction:<9}"
    if row.milliseconds is None:
        return f"{row.operation:<14} {row.by}: {row.note}"
    assert row.rate is not None
    assert row.share is not None
    rate = _rate(row.rate, row.unit)
    return f"{head} {row.milliseconds:9.3f} ms {rate} {row.share:4.0%}{'  auto' * row.chosen}  {row.note}".rstrip()


def _rate(rate: float, unit: str) -> str:
    """With three digits: a CPU's in GB/s and GFLOP/s."""
    small = rate < 0.5
    return f"{1e3 * rate:7.1f} {unit.replace('T', 'G', 1):<7}" if small else f"{rate:7.2f} {unit:<7}"


def draw(rows: list[Row], ceilings: Ceilings, device: str, path: Path) -> None:
    """One panel an operation and pass: the rate of everyone at every size, and the measured ceiling as a line."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.rate is not None:
            panels.setdefault((row.operation, row.direction), []).append(row)
    if not panels:
        raise UserError("--png: nothing was measured, so there is nothing to draw")
    figure = Figure(figsize=(11, 2 + 2.4 * len(panels)), layout="constrained")
    figure.suptitle(f"Kernels on {device}")
    for axis, ((operation, direction), some) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
    ):
        sizes = list(dict.fromkeys(row.size for row in some))
        names = list(dict.fromkeys(row.by for row in some))
        for index, name in enumerate(names):
            mine = {row.size: row.rate for row in some if row.by == name}
            places = [at + index * 0.8 / len(names) for at, size in enumerate(sizes) if size in mine]
            axis.bar(places, [mine[size] for size in sizes if size in mine], 0.8 / len(names), label=name, align="edge")
        ceiling = ceilings.copy_terabytes if some[0].unit == "TB/s" else ceilings.matmul_teraflops
        axis.axhline(ceiling, color="black", linewidth=0.8, linestyle="--")
        axis.set_xticks([at + 0.4 for at in range(len(sizes))], sizes, fontsize="small")
        axis.set_ylabel(some[0].unit)
        axis.set_title(f"{operation}, {direction}", fontsize="medium")
        axis.legend(fontsize="x-small", ncols=len(names))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    command_line(main)
