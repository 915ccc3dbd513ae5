"""Kernels of norms and SwiGLU against float64 and their twins, in Triton's interpreter or on a GPU.

This file is also a program: `python -m support.kernels FILE OPERATION...` computes every case of the operations under
the interpreter and saves the tensors to FILE.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megacode.kernels import rms_norm as norm
from megacode.kernels import swiglu
from support import triton_offline
from support.triton_offline import bf16_as_in_hardware, compile_for_hopper, tool

EPSILON = 1e-5


def _exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


@dataclass(frozen=True)
class Operation:
    """An operation's kernel, its twin and its definition, each a function of the case's tensors."""

    triton: Callable[..., Any]
    torch: Callable[..., Any]
    exact: Callable[..., Any]


OPERATIONS = {
    "rms_norm": Operation(
        lambda x, weight: norm.rms_norm_triton(x, weight, EPSILON),
        lambda x, weight: norm.rms_norm_torch(x, weight, EPSILON),
        _exact_norm,
    ),
    "add_rms_norm": Operation(
        lambda x, residual, weight: norm.add_rms_norm_triton(x, residual, weight, EPSILON),
        lambda x, residual, weight: norm.add_rms_norm_torch(x, residual, weight, EPSILON),
        lambda x, residual, weight: (x + residual, _exact_norm(x + residual, weight)),
    ),
    "swiglu": Operation(swiglu.swiglu_triton, swiglu.swiglu_torch, lambda gate, up: F.silu(gate) * up),
    "swiglu_packed": Operation(
        swiglu.swiglu_packed_triton,
        swiglu.swiglu_packed_torch,
        lambda packed: F.silu(packed[..., : packed.shape[-1] // 2]) * packed[..., packed.shape[-1] // 2 :],
    ),
}


@dataclass(frozen=True)
class Case:
    """Inputs of an operation: hidden states [*leading, width]."""

    operation: str
    leading: tuple[int, ...]
    width: int
    dtype: torch.dtype = torch.float32
    layout: str = "plain"
    """plain; sliced: rows of wider ones; transposed: no single stride between rows; alternate: every second column."""
    gradient: str = "random"
    """random; expanded: that of a sum, with stride 0 everywhere; sliced: as the layout of that name."""
    used: int | None = None
    """The output that alone is differentiated; None: all of them."""

    def inputs(self, device: str = "cpu") -> list[Tensor]:
        """Tensors that require gradients, the same numbers in every process."""
        generator = torch.Generator().manual_seed(self.width)
        shape = (*self.leading, self.width * 2 if self.operation == "swiglu_packed" else self.width)
        count = 1 if self.operation in ("rms_norm", "swiglu_packed") else 2
        values = [_lay(torch.randn(shape, generator=generator) * 2, self.layout) for _ in range(count)]
        if "norm" in self.operation:
            values.append(1 + torch.randn(self.width, generator=generator) / 4)
        # Of a strided view `to` keeps no strides on a change of dtype: the wider tensor is what is converted.
        return [_like(x, x.to(self.dtype), device).requires_grad_() for x in values]

    def grads(self, outputs: list[Tensor]) -> list[Tensor]:
        """The outputs' gradients: numbers that bf16 holds."""
        if self.gradient == "expanded":
            return [torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape) for x in outputs]
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(x.shape, generator=generator).bfloat16().float() for x in outputs]
        layout = "plain" if self.gradient == "random" else self.gradient
        return [_like(_lay(x, layout), x.to(y.dtype), y.device) for x, y in zip(grads, outputs, strict=True)]


def _lay(x: Tensor, layout: str) -> Tensor:
    if layout == "sliced":
        return F.pad(x, (8, 8))[..., 8:-8]
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "alternate":
        return torch.stack((x, x), dim=-1)[..., 0]
    return x


def _like(strided: Tensor, values: Tensor, device: Any) -> Tensor:
    """`values` on `device` with the strides of `strided`, which may leave gaps."""
    out = torch.empty(strided.untyped_storage().size() // strided.element_size(), dtype=values.dtype, device=device)
    view = out.as_strided(strided.shape, strided.stride(), strided.storage_offset())
    return view.copy_(values).detach()


def compute(case: Case, by: str, device: str = "cpu") -> list[Tensor]:
    """The case's outputs and then its inputs' gradients, by `triton`, `torch` or, in float64, by `exact`."""
    inputs = case.inputs(device)
    if by == "exact":
        inputs = [x.detach().double().requires_grad_() for x in inputs]
    result = getattr(OPERATIONS[case.operation], by)(*inputs)
    outputs = list(result) if isinstance(result, tuple) else [result]
    if by == "triton":
        assert all(x.is_contiguous() for x in outputs)
        assert all(x.dtype == case.dtype for x in outputs)
    used = slice(None) if case.used is None else slice(case.used, case.used + 1)
    grads = torch.autograd.grad(outputs[used], inputs, case.grads(outputs)[used], materialize_grads=True)
    return [x.detach() for x in (*outputs, *grads)]


def check(case: Case, actual: list[Tensor], device: str = "cpu") -> None:
    """Each tensor's largest error is at most twice the twin's, or what a few roundings of the largest value cost."""
    # The twin may hit the exact number by luck. Storing bf16 costs half a unit in the last place; fp32 is rounded at
    # each step, and a GPU's exponential, root and quotient are approximations, within two units.
    units = 0.5 if case.dtype == torch.bfloat16 else 4 if device == "cuda" else 1
    for index, (mine, twin, exact) in enumerate(
        zip(actual, compute(case, "torch", device), compute(case, "exact", device), strict=True)
    ):
        assert (mine.dtype, mine.shape) == (twin.dtype, twin.shape)
        assert mine.isfinite().all()
        if mine.numel() == 0:
            continue
        error, allowed = ((x.double() - exact).abs().max().item() for x in (mine, twin))
        allowed = max(2 * allowed, units * torch.finfo(case.dtype).eps * exact.abs().max().item())
        assert error <= allowed, f"tensor {index} of {case}: {error:.2e}, allowed {allowed:.2e}"


def _cases(operation: str, sizes: dict[int, int]) -> dict[str, Case]:
    """Plain ones of each size with that many rows, and one size in other layouts."""
    cases = {}
    for dtype, word in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        plain = {f"{size}": Case(operation, (rows,), size, dtype) for size, rows in sizes.items()}
        some = Case(operation, (2, 3), 136, dtype)
        plain["one_row"] = replace(some, leading=(1,))
        plain["a_vector"] = replace(some, leading=())
        plain["no_rows"] = replace(some, leading=(2, 0))
        for layout in ("sliced", "transposed", "alternate"):
            plain[layout] = replace(some, layout=layout)
        for gradient in ("expanded", "sliced"):
            plain[f"{gradient}_gradient"] = replace(some, gradient=gradient)
        cases |= {f"{operation}-{name}-{word}": case for name, case in plain.items()}
    return cases


# A processor holds up to 32 programs of one warp, 4 of eight: in these some programs take one row more than others.
_NORMS, _PRODUCTS = {1: 5, 127: 37, 129: 3, 4096: 5}, {1: 5, 127: 3, 129: 3, 1024: 2, 4099: 2}
CASES = (
    _cases("rms_norm", _NORMS)
    | _cases("add_rms_norm", _NORMS)
    | _cases("swiglu", _PRODUCTS)
    | _cases("swiglu_packed", _PRODUCTS)
    | {f"add_rms_norm-output_{used}": Case("add_rms_norm", (3,), 24, used=used) for used in (0, 1)}
    | {"rms_norm-16384-bf16": Case("rms_norm", (3,), 16384, torch.bfloat16)}
    | {"add_rms_norm-5120-bf16": Case("add_rms_norm", (5,), 5120, torch.bfloat16)}
)


def named(*operations: str) -> list[str]:
    """The names of the operations' cases."""
    return [name for name, case in CASES.items() if case.operation in operations]


def saved(case: Case) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of the tensors that the kernel keeps for backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        OPERATIONS[case.operation].triton(*case.inputs())
    return [(x.dtype, tuple(x.shape)) for x in kept]


def _large() -> list[Tensor]:
    """swiglu and its gradients where sigmoid saturates: up is 2."""
    gate = torch.tensor([[-1e4, -200.0, -89.0, 89.0, 200.0, 1e4]], requires_grad=True)
    up = torch.full_like(gate, 2.0, requires_grad=True)
    out = swiglu.swiglu_triton(gate, up)
    return [x.detach()[0] for x in (out, *torch.autograd.grad(out.sum(), (gate, up)))]


def interpret(path: Path, *operations: str) -> dict[str, Any]:
    """What this program computes of the operations' cases, under the interpreter."""
    return triton_offline.interpret("support.kernels", path, *operations)


def resources(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, folder: Path) -> tuple:
    """(PTX, registers a thread, bytes of stack a thread) of a kernel; arguments as of `compile_for_hopper`."""
    compiled = compile_for_hopper(kernel, types, constants, num_warps=warps)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tool("cuobjdump"), "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return compiled.asm["ptx"], registers, stack


if __name__ == "__main__":
    results: dict[str, Any] = {"imported": [name for name in ("triton", "deepspeed") if name in sys.modules]}
    bf16_as_in_hardware()
    for label in named(*sys.argv[2:]):
        results[label] = compute(CASES[label], "triton")
    results["saved"] = {word: saved(Case(word, (3, 5), 24, torch.bfloat16)) for word in sys.argv[2:]}
    if "swiglu" in sys.argv[2:]:
        results["large"] = _large()
    torch.save(results, sys.argv[1])
