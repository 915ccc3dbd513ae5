"""Kernels: which backend each operation takes here and why, and whether each that serves here computes rightly."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megacode.doctor.finding import Finding, verdict
from megacode.doctor.versions import one_line
from megacode.engine import optimizer
from megacode.kernels import dispatch
from megacode.kernels.attention import Segments
from megacode.kernels.cross_entropy import IGNORE

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Largest difference over the largest value. fp32: a sum of some hundred terms loses some hundred times 6e-8. bf16: the
weights, the results and the gradients are each rounded to 4e-3. A wrong kernel is off by the order of 1."""


def dtypes(device: torch.device) -> list[torch.dtype]:
    """Those that training would use on the device."""
    return [torch.bfloat16] if device.type == "cuda" else [torch.float32, torch.bfloat16]


def word(dtype: torch.dtype) -> str:
    """bf16 or fp32, as recipes say it."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def check_backends(device: torch.device) -> Iterator[Finding]:
    """Each operation's backend and what speaks against the ones before it."""
    for dtype in dtypes(device):
        for operation in dispatch.TABLE:
            choice = dispatch.choose(operation, dispatch.task(device, dtype))
            yield Finding(f"{operation} {word(dtype)}", "ok", f"{choice.name}: {choice.reason}")
        choice = dispatch.choose("attention", dispatch.task(device, dtype, segments=True))
        yield Finding(f"attention of documents {word(dtype)}", "ok", f"{choice.name}: {choice.reason}")


def check_optimizer(device: torch.device) -> Finding:
    """The backend of the optimizer's step, and whether a recipe could ask for another."""
    rows = optimizer.explain(device)
    chosen = next(row.backend for row in rows if row.chosen)
    others = [row for row in rows if not row.chosen]
    texts = [f"not {row.backend}: {row.refusal}" if row.refusal else f"{row.backend} would serve" for row in others]
    return Finding("optimizer fp32", "ok", f"{chosen}: {'; '.join(texts)}")


WHOLE = "whole sequences"
"""The one case of attention for backends that know no segments."""


def _heads(batch: int, sequence: int, heads: int, head_dim: int = 32) -> Tensor:
    return torch.randn(batch, sequence, heads, head_dim, dtype=torch.float64)


def _rope() -> dict[str, list[Any]]:
    q, k = _heads(2, 65, 4).flatten(-2), _heads(2, 65, 2).flatten(-2)
    return {"": [q, k, torch.randint(0, 16_384, (2, 65)), 1e6, 32]}


def _attention() -> dict[str, list[Any]]:
    documents = Segments.between([0, 37, 38, 128, 150, 256])
    fewer = Segments.between([0, 10, 11, 40, 64], [0, 37, 38, 100, 128])
    k, v = _heads(2, 128, 2), _heads(2, 128, 2)
    return {
        WHOLE: [_heads(2, 128, 4), k, v, None],
        "documents": [_heads(2, 128, 4), k, v, documents],
        # What context parallelism asks for: the queries are the last of the keys' tokens.
        "fewer queries than keys": [_heads(2, 48, 4), k, v, None],
        "documents with fewer queries than keys": [_heads(1, 64, 4), k[:1], v[:1], fewer],
    }


def _states() -> Tensor:
    return 2 * torch.randn(2, 33, 136, dtype=torch.float64)


def _rms_norm() -> dict[str, list[Any]]:
    return {"": [_states(), _states()[0, 0], 1e-5]}


def _add_rms_norm() -> dict[str, list[Any]]:
    return {"": [_states(), _states(), _states()[0, 0], 1e-5]}


def _swiglu() -> dict[str, list[Any]]:
    return {"": [_states(), _states()]}


def _cross_entropy() -> dict[str, list[Any]]:
    labels = torch.randint(0, 1001, (37,))
    labels[::5] = IGNORE
    return {"": [2 * torch.randn(37, 1001, dtype=torch.float64), labels]}


INPUTS: dict[str, Callable[[], dict[str, list[Any]]]] = {
    "attention": _attention,
    "rope": _rope,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "swiglu": _swiglu,
    "cross_entropy": _cross_entropy,
}
"""Operation -> the arguments of its cases by name; the floating-point tensors are the ones that are differentiated."""


def check_twins(device: torch.device) -> Iterator[Finding]:
    """Every backend that serves here against its plain-torch twin in fp64 on the CPU, forward and backward."""
    for dtype in dtypes(device):
        for operation, backends in dispatch.TABLE.items():
            for name, backend in backends.items():
                if backend.refusal(dispatch.task(device, dtype)) is None:
                    packed = backend.refusal(dispatch.task(device, dtype, segments=True)) is None
                    yield check_twin(operation, name, backend.function, device, dtype, packed)


def check_twin(
    operation: str, name: str, function: Callable[..., Any], device: torch.device, dtype: torch.dtype,
    packed: bool = True,
) -> Finding:  # fmt: skip
    """One backend against the twin, the last of the operation's table; without segments if it is not `packed`."""
    title = f"{operation} {word(dtype)} by {name}"
    if operation not in INPUTS:
        return Finding(title, "skipped", "the doctor has no case for this operation")
    torch.manual_seed(0)
    twin = list(dispatch.TABLE[operation].values())[-1].function
    worst, errors = "", (0.0, 0.0)
    for case, inputs in INPUTS[operation]().items():
        if not packed and case != WHOLE:
            continue
        try:
            found = _errors(function, twin, inputs, device, dtype)
        except Exception as error:
            return Finding(
                title, "WRONG", f"{case}: " * bool(case) + f"fails: {one_line(error)}", _mend(operation, name)
            )
        if max(found) >= max(errors):
            worst, errors = case, found
    forward, backward = errors
    right = max(errors) <= TOLERANCE[dtype]
    text = f"forward {forward:.1e}, backward {backward:.1e} from fp64, tolerance {TOLERANCE[dtype]:.0e}"
    return verdict(title, right, text + f" ({worst})" * bool(worst and not right), _mend(operation, name))


def _errors(
    function: Callable[..., Any], twin: Callable[..., Any], inputs: list[Any], device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Largest relative differences from the twin in fp64, of outputs and of gradients."""
    # The inputs are rounded first: both sides start from the same numbers.
    inputs = [x.to(dtype) if _differentiable(x) else x for x in inputs]
    exact = _differentiate(twin, [x.double() if _differentiable(x) else x for x in inputs])
    actual = _differentiate(function, [x.to(device) if isinstance(x, Tensor | Segments) else x for x in inputs])
    errors = [relative(x, y) for x, y in zip(actual, exact, strict=True)]
    num_grads = sum(map(_differentiable, inputs))
    return max(errors[:-num_grads]), max(errors[-num_grads:])


def _mend(operation: str, name: str) -> str:
    if name == "torch":
        return "install torch again: its own kernels err"
    return f"ask for another in the recipe (kernels.{operation.removeprefix('add_')}: torch), and update {name}"


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _differentiate(function: Callable[..., Any], inputs: list[Any]) -> list[Tensor]:
    """The outputs and then the gradients of their sum weighted with fixed numbers."""
    arguments = [x.detach().requires_grad_() if _differentiable(x) else x for x in inputs]
    # Copies: rope writes into what it is given, which torch refuses of a leaf.
    result = function(*(x.clone() if _differentiable(x) else x for x in arguments))
    outputs = list(result) if isinstance(result, tuple) else [result]
    weights = [_weights(x) for x in outputs]
    leaves = [x for x in arguments if _differentiable(x)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, weights)]


def _weights(x: Tensor) -> Tensor:
    """Numbers of the order of 1 that bf16 holds exactly, the same for every backend."""
    generator = torch.Generator().manual_seed(x.numel())
    return (torch.randint(-8, 9, x.shape, generator=generator) / 8).to(x.device, x.dtype)


def relative(actual: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest value; infinite where a value is not finite."""
    difference = (actual.detach().double().cpu() - exact.double()).abs().max() / exact.double().abs().max()
    return float(difference) if difference.isfinite() else float("inf")
