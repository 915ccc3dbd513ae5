"""What tools/bench/kernels.py measures: operations, their sizes, the bytes or FLOPs that each must cost, and rivals."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megacode.kernels import dispatch
from megacode.kernels.attention import Segments
from megacode.kernels.linear_cross_entropy import linear_cross_entropy_torch, linear_cross_entropy_triton
from megacode.kernels.packages import import_failure
from megacode.kernels.rope import inverse_frequencies
from megacode.kernels.swiglu import swiglu_packed_torch, swiglu_packed_triton

EPSILON, THETA, VOCABULARY, HIDDEN = 1e-5, 1e6, 32016, 4096

Function = Callable[..., Any]


class Cost(NamedTuple):
    """The least that a pass must move or compute."""

    bytes: float = 0
    flops: float = 0


@dataclass(frozen=True)
class Case:
    """An operation at a size.

    Its arguments are made anew where it overwrites them. Floating-point tensors among them are differentiated.
    """

    operation: str
    size: str
    task: dispatch.Task
    arguments: Callable[[], list[Any]]
    forward: Cost
    backward: Cost | None
    """None: the pass is one, forward and backward together."""
    rivals: dict[str, Function | str]
    """Who else computes it, by name, or why it cannot."""
    exact: Function
    """The twin in plain torch, that is asked in fp32."""
    weighed: bool = False
    """Whether the memory that a call takes is measured as well."""


TOKENS, ATTENTION_TOKENS = (8192, 65536), (4096, 16384)
"""How many tokens the cases have."""


OPERATIONS = (*dispatch.TABLE, "swiglu_packed", "linear_cross_entropy")
"""The model's, and kernels that it does not use."""


def cases(
    device: torch.device, dtype: torch.dtype, tokens: list[int] | None = None, only: list[str] | None = None
) -> list[Case]:
    """Every operation, or some, at widths of Code Llama 7B, 34B and 70B.

    tokens: other numbers than the usual ones.
    """
    makers: dict[str, list[Callable[..., Case]]] = {
        "rms_norm": [partial(_norm, width=width) for width in (4096, 8192)],
        "add_rms_norm": [partial(_add_norm, width=width) for width in (4096, 8192)],
        "rope": [partial(_rope, heads=heads, kv_heads=kv_heads) for heads, kv_heads in ((32, 32), (64, 8))],
        "swiglu": [partial(_swiglu, width=width) for width in (11008, 22016)],
        "swiglu_packed": [_swiglu_packed],
        "cross_entropy": [_cross_entropy],
        "linear_cross_entropy": [_linear_cross_entropy],
        "attention": [
            partial(_attention, heads=heads, kv_heads=kv_heads, head_dim=head_dim, documents=documents)
            for heads, kv_heads, head_dim, documents in (
                (32, 32, 128, 1), (64, 8, 128, 1), (32, 32, 64, 1), (32, 32, 128, 8),
            )
        ],
    }  # fmt: skip
    return [
        make(device, dtype, count)
        for operation, sizes in makers.items()
        if only is None or operation in only
        for make in sizes
        for count in tokens or (ATTENTION_TOKENS if operation == "attention" else TOKENS)
    ]


def subjects(case: Case) -> dict[str, Function | str]:
    """Everyone who computes the case, or why not: the backends of the dispatch, then the rivals."""
    found: dict[str, Function | str] = {}
    for name, backend in dispatch.TABLE.get(case.operation, {}).items():
        refusal = backend.refusal(case.task)
        found[name] = backend.function if refusal is None else refusal
    return found | case.rivals


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def _compiled(function: Function, device: torch.device) -> Function | str:
    if device.type != "cuda":
        return "torch.compile is compared on CUDA only"
    torch._dynamo.reset()  # or else the second size would get a graph for all sizes
    return torch.compile(function, dynamic=False)


def _liger(function: Function, device: torch.device) -> Function | str:
    if device.type != "cuda":
        return f"it needs a CUDA device and this one is {device.type}"
    return import_failure("liger_kernel.ops", "liger-kernel") or function


def _twin(operation: str) -> Function:
    return dispatch.TABLE[operation]["torch"].function


def _eager_and_compiled(function: Function, device: torch.device) -> dict[str, Function | str]:
    return {"eager": function, "compiled": _compiled(function, device)}


# ---- the operations as transformers writes them, and by Liger where it has a kernel that no backend is


def norm_eager(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """LlamaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def add_norm_eager(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The sum before it, and LlamaRMSNorm."""
    total = x + residual
    return total, norm_eager(total, weight, epsilon)


Tables = tuple[Tensor, Tensor]
"""cos and sin [1, tokens, head_dim], which transformers makes once a forward for all layers."""


def rope_eager(tables: Tables, q: Tensor, k: Tensor, positions: Tensor, theta: float, head_dim: int) -> Tables:
    """apply_rotary_pos_emb."""
    cos, sin = tables

    def turn(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, head_dim))
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]

    return turn(q), turn(k)


def rope_liger(tables: Tables, q: Tensor, k: Tensor, positions: Tensor, theta: float, head_dim: int) -> Tables:
    """Liger's, in place."""
    cos, sin = tables
    q, k = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k))
    q, k = importlib.import_module("liger_kernel.ops").LigerRopeFunction.apply(q, k, cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _tables(device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int) -> Tables:
    angles = torch.arange(tokens, device=device)[None, :, None] * inverse_frequencies(head_dim, THETA, device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def swiglu_eager(gate: Tensor, up: Tensor) -> Tensor:
    """LlamaMLP's."""
    return F.silu(gate) * up


def cross_entropy_eager(logits: Tensor, labels: Tensor) -> Tensor:
    """ForCausalLMLoss's, a loss each."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def linear_cross_entropy_eager(x: Tensor, weight: Tensor, labels: Tensor, factors: Tensor) -> Tensor:
    """The head, and the mean loss of its logits."""
    return F.cross_entropy(F.linear(x, weight).float(), labels)


def linear_cross_entropy_liger(x: Tensor, weight: Tensor, labels: Tensor, factors: Tensor) -> Tensor:
    """Liger's, in chunks too."""
    module = importlib.import_module("liger_kernel.transformers.functional")
    return module.liger_fused_linear_cross_entropy(x, weight, labels)


def products(x: Tensor, weight: Tensor, labels: Tensor, factors: Tensor) -> Tensor:
    """The matrix products alone: what the others would take if the rest were free."""
    return F.linear(x, weight)


def cross_entropy_liger(logits: Tensor, labels: Tensor) -> Tensor:
    """Liger's sum of losses, with its gradient in forward."""
    module = importlib.import_module("liger_kernel.transformers.functional")
    return module.liger_cross_entropy(logits, labels, reduction="sum")


# ---- the cases


def _norm(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> Case:
    w = dtype.itemsize * tokens * width
    return Case(
        "rms_norm", f"{tokens} x {width}", dispatch.task(device, dtype, hidden=width),
        lambda: [_random(device, dtype, tokens, width), _random(device, dtype, width), EPSILON],
        Cost(2 * w), Cost(3 * w), _eager_and_compiled(norm_eager, device), _twin("rms_norm"),
    )  # fmt: skip


def _add_norm(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> Case:
    w = dtype.itemsize * tokens * width
    made = [(tokens, width), (tokens, width), (width,)]
    return Case(
        "add_rms_norm", f"{tokens} x {width}", dispatch.task(device, dtype, hidden=width),
        lambda: [*(_random(device, dtype, *shape) for shape in made), EPSILON],
        Cost(4 * w), Cost(4 * w), _eager_and_compiled(add_norm_eager, device), _twin("add_rms_norm"),
    )  # fmt: skip


def _rope(device: torch.device, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int) -> Case:
    def arguments() -> list[Any]:
        # A sum each: what is rotated in place is no leaf.
        q, k = (_random(device, dtype, 1, tokens, count * 128) + 0 for count in (heads, kv_heads))
        return [q, k, torch.arange(tokens, device=device)[None], THETA, 128]

    w = dtype.itemsize * tokens * (heads + kv_heads) * 128
    tables = _tables(device, dtype, tokens, 128)
    rivals = _eager_and_compiled(partial(rope_eager, tables), device)
    rivals |= {"liger": _liger(partial(rope_liger, tables), device)}
    return Case(
        "rope", f"{tokens} x ({heads} + {kv_heads}) x 128", dispatch.task(device, dtype), arguments,
        Cost(2 * w), Cost(2 * w), rivals, _twin("rope"),
    )  # fmt: skip


def _swiglu(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> Case:
    w = dtype.itemsize * tokens * width
    return Case(
        "swiglu", f"{tokens} x {width}", dispatch.task(device, dtype),
        lambda: [_random(device, dtype, tokens, width) for _ in range(2)],
        Cost(3 * w), Cost(5 * w), _eager_and_compiled(swiglu_eager, device), _twin("swiglu"),
    )  # fmt: skip


def _cross_entropy(device: torch.device, dtype: torch.dtype, tokens: int) -> Case:
    labels = torch.randint(VOCABULARY, (tokens,), device=device)
    rivals = _eager_and_compiled(cross_entropy_eager, device) | {"liger": _liger(cross_entropy_liger, device)}
    return Case(
        "cross_entropy", f"{tokens} x {VOCABULARY}", dispatch.task(device, dtype),
        lambda: [_random(device, dtype, tokens, VOCABULARY), labels],
        Cost(2 * dtype.itemsize * tokens * VOCABULARY), None, rivals, _twin("cross_entropy"),
    )  # fmt: skip


def _linear_cross_entropy(device: torch.device, dtype: torch.dtype, tokens: int) -> Case:
    width = HIDDEN
    labels = torch.randint(VOCABULARY, (tokens,), device=device)
    factors = torch.full((), 1 / tokens, device=device)

    def arguments() -> list[Any]:
        # Of the size that initial weights have, else all but one probability would be 0.
        weight = torch.randn(VOCABULARY, width, device=device, dtype=dtype).mul_(0.02).requires_grad_()
        return [_random(device, dtype, tokens, width), weight, labels, factors]

    task = dispatch.task(device, dtype, hidden=width)
    refusal = dispatch.TABLE["cross_entropy"]["triton"].refusal(task)
    ours = (lambda *given: linear_cross_entropy_triton(*given)[0]) if refusal is None else refusal
    rivals = {
        "triton": ours, "torch": _linear_cross_entropy_torch, "products": products,
        **_eager_and_compiled(linear_cross_entropy_eager, device),
        "liger": _liger(linear_cross_entropy_liger, device),
    }  # fmt: skip
    return Case(
        "linear_cross_entropy", f"{tokens} x {width} x {VOCABULARY}", task, arguments,
        Cost(flops=6 * tokens * width * VOCABULARY), None, rivals, _linear_cross_entropy_torch, weighed=True,
    )  # fmt: skip


def _linear_cross_entropy_torch(*arguments: Any) -> Tensor:
    return linear_cross_entropy_torch(*arguments)[0]


def _swiglu_packed(device: torch.device, dtype: torch.dtype, tokens: int) -> Case:
    width, task = 11008, dispatch.task(device, dtype)
    w = dtype.itemsize * tokens * width
    refusal = dispatch.TABLE["swiglu"]["triton"].refusal(task)
    rivals: dict[str, Function | str] = {
        "triton": swiglu_packed_triton if refusal is None else refusal, "torch": swiglu_packed_torch,
        **_eager_and_compiled(lambda packed: swiglu_eager(*packed.chunk(2, dim=-1)), device),
    }  # fmt: skip
    return Case(
        "swiglu_packed", f"{tokens} x 2 x {width}", task, lambda: [_random(device, dtype, tokens, 2 * width)],
        Cost(3 * w), Cost(5 * w), rivals, swiglu_packed_torch,
    )  # fmt: skip


def _attention_exact(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """The twin, with as many key heads as queries have: torch has no fp32 kernel for groups that fits in memory."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    return _twin("attention")(q, k, v, segments)


def _attention(
    device: torch.device, dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, head_dim: int, documents: int
) -> Case:
    bounds = [tokens * i // documents for i in range(documents + 1)]
    segments = Segments.between(bounds).to(device) if documents > 1 else None
    counts = (heads, kv_heads, kv_heads)
    flops = 2 * tokens * (tokens / documents) * heads * head_dim  # half of two products
    size = f"{tokens}, {heads} heads on {kv_heads}, of {head_dim}" + f", {documents} documents" * (documents > 1)
    return Case(
        "attention", size, dispatch.task(device, dtype, head_dim=head_dim, segments=documents > 1),
        lambda: [*(_random(device, dtype, 1, tokens, count, head_dim) for count in counts), segments],
        Cost(flops=flops), Cost(flops=2.5 * flops), {}, _attention_exact,
    )  # fmt: skip
