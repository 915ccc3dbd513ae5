"""`python -m megacode.tools.bench.flash_tiles`: the kernels of flash attention at many tile sizes, for its table.

Each candidate is compiled once in processes of their own, all cores at a time, into Triton's cache; then all are timed
one after the other, with the results of the table's tiles beside each as the proof that it computes the same.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacode.errors import UserError
from megacode.tools.bench.kernels import timed
from megacode.tools.bench.processes import command_line
from megacode.tools.output import JsonFile, json_output

if TYPE_CHECKING:
    from torch import Tensor

    from megacode.kernels.flash_attention import Tile, Tiles

KERNELS = ("forward", "grad_q", "grad_kv")
PRODUCTS = {"forward": 2, "grad_q": 3, "grad_kv": 4}
"""Products of queries and keys that a kernel computes, each 2 * head_dim FLOPs a pair."""
SHAPES = {
    "forward": [(128, 64, 8), (128, 64, 4), (128, 128, 8), (64, 64, 4), (64, 128, 4), (128, 32, 4)],
    "grad_q": [(128, 64, 8), (128, 32, 8), (128, 32, 4), (128, 128, 8), (64, 64, 4), (64, 32, 4), (64, 128, 4)],
    "grad_kv": [(64, 128, 8), (32, 128, 8), (32, 128, 4), (64, 64, 4), (32, 64, 4), (128, 128, 8), (64, 128, 4)],
}
"""Kernel -> (queries, keys, warps)."""
STAGES = (1, 2, 3, 4)
TOLERANCE = 2e-2
"""Largest difference from the table's results, of the largest value."""


@dataclass(frozen=True)
class Row:
    """A kernel at a tile size."""

    head_dim: int
    kernel: str
    tile: Tile
    milliseconds: float | None
    """Median; None: it does not run, and `note` says why."""
    teraflops: float | None
    """Of what the kernel computes, the causal half."""
    in_table: bool
    note: str = ""


def candidates(head_dim: int) -> Iterator[tuple[str, Tiles]]:
    """(kernel, the table's tiles but for that kernel's)."""
    from megacode.kernels.flash_attention import Tile, tiles_of

    for kernel in KERNELS:
        for shape in SHAPES[kernel]:
            for stages in STAGES:
                yield kernel, tiles_of(2, head_dim)._replace(**{kernel: Tile(*shape, stages)})


class _Call:
    """One call's tensors, and each kernel of it by itself."""

    def __init__(self, tokens: int, heads: int, head_dim: int) -> None:
        import torch

        torch.manual_seed(0)
        shape = (1, tokens, heads, head_dim)
        self.q, self.k, self.v, self.grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        self.out, self.delta = torch.empty_like(self.q), torch.empty(1, heads, tokens, device="cuda")
        self.lse = torch.empty_like(self.delta)
        self.grads = [torch.empty_like(self.q) for _ in range(3)]

    def run(self, kernel: str, tile: Tile) -> list[Tensor]:
        """What the kernel writes."""
        from megacode.kernels.flash_attention import launch

        q, k, v, grads = self.q, self.k, self.v, self.grads
        arguments: dict[str, tuple[Any, ...]] = {
            "forward": (q, k, v, self.out, self.lse),
            "grad_q": (q, k, v, self.out, self.grad, self.lse, None, self.delta, grads[0]),
            "grad_kv": (q, k, v, self.grad, self.lse, self.delta, grads[1], grads[2]),
        }
        launch(kernel, tile, arguments[kernel])
        return {"forward": [self.out, self.lse], "grad_q": grads[:1], "grad_kv": grads[1:]}[kernel]


def _compile(kernel: str, tile: Tile, sizes: tuple[int, int, int]) -> str:
    """In a process of its own: run once; what went wrong, or ""."""
    import torch

    try:
        _Call(*sizes).run(kernel, tile)
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory is a finding
        return " ".join(str(error).split())[:100] or type(error).__name__
    return ""


def sweep(head_dims: list[int], tokens: int, heads: int, workers: int) -> Iterator[Row]:
    """Every candidate."""
    wanted = [(head_dim, *each) for head_dim in head_dims for each in candidates(head_dim)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        notes = list(
            pool.map(
                _compile,
                [kernel for _, kernel, _ in wanted],
                [getattr(tiles, kernel) for _, kernel, tiles in wanted],
                [(tokens, heads, head_dim) for head_dim, _, _ in wanted],
            )
        )
    for (head_dim, kernel, tiles), note in zip(wanted, notes, strict=True):
        yield _time(head_dim, kernel, tiles, tokens, heads, note)


def _time(head_dim: int, kernel: str, tiles: Tiles, tokens: int, heads: int, note: str) -> Row:
    import torch

    from megacode.kernels.flash_attention import tiles_of

    tile, usual = getattr(tiles, kernel), tiles_of(2, head_dim)
    in_table = tile == getattr(usual, kernel)
    if note:
        return Row(head_dim, kernel, tile, None, None, in_table, note)
    call = _Call(tokens, heads, head_dim)
    for before in KERNELS[: KERNELS.index(kernel)]:
        call.run(before, getattr(usual, before))
    right = [x.clone() for x in call.run(kernel, getattr(usual, kernel))]
    for x, y in zip(call.run(kernel, tile), right, strict=True):
        if not float((x - y).abs().max()) <= TOLERANCE * float(y.abs().max()):
            note = "WRONG: not what the table's tile gives"
    milliseconds = timed(lambda: call.run(kernel, tile), torch.device("cuda"))
    flops = PRODUCTS[kernel] * tokens * tokens * head_dim * heads
    return Row(head_dim, kernel, tile, milliseconds, flops / milliseconds / 1e9, in_table, note)


def main(
    head_dim: Annotated[list[int] | None, typer.Option(help="64 or 128; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(min=128, help="Of one sequence.")] = 8192,
    heads: Annotated[int, typer.Option(min=1, help="Of queries and of keys.")] = 32,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that compile; one a core if not given.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Time the three kernels of flash attention in bf16 at many tile sizes; print the quickest first.

    Example: python -m megacode.tools.bench.flash_tiles --head-dim 128
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("there is no CUDA device that torch sees; tiles are measured on one")
    with json_output(json_file) as write:
        rows = list(sweep(head_dim or [128, 64], tokens, heads, workers or os.cpu_count() or 1))
        write({"device": torch.cuda.get_device_name(), "tokens": tokens, "heads": heads,
               "rows": [asdict(row) for row in rows]})  # fmt: skip
    for row in sorted(rows, key=lambda row: (-row.head_dim, KERNELS.index(row.kernel), row.milliseconds or 1e9)):
        speed = "" if row.milliseconds is None else f"{row.milliseconds:7.3f} ms {row.teraflops:6.0f} TFLOP/s"
        sizes = "{:3} queries {:3} keys {} warps {} stages".format(*row.tile)
        print(f"{row.head_dim:3} {row.kernel:<8} {sizes} {speed}{'  table' * row.in_table}  {row.note}".rstrip())


if __name__ == "__main__":
    command_line(main)
