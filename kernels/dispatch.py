"""Which backend computes an operation here: one table, one choice, one explanation. Imports no backend until asked."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version

from megacode.kernels import packages
from megacode.kernels.attention import attention_cudnn, attention_sdpa_flash, attention_torch, attention_triton
from megacode.kernels.cross_entropy import cross_entropy_torch, cross_entropy_triton
from megacode.kernels.packages import import_failure
from megacode.kernels.rms_norm import add_rms_norm_torch, add_rms_norm_triton, rms_norm_torch, rms_norm_triton
from megacode.kernels.rope import rope_torch, rope_triton
from megacode.kernels.swiglu import swiglu_torch, swiglu_triton


class UnservableError(ValueError):
    """A backend was asked for by name that does not exist or cannot serve. The message is one line with the mend."""


@dataclass(frozen=True)
class Task:
    """What the backends of a model's operations would have to serve."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int = 128
    hidden: int = 4096
    segments: bool = False
    """Whether attention stays inside of segments: packed documents, or the parts of sequences that context ranks have.
    No backend may ignore them; some cannot serve them."""
    capability: tuple[int, int] = (0, 0)
    """Of a CUDA device: (8, 0) for an A100, (9, 0) for an H100 or H200."""


def task(device: torch.device, dtype: torch.dtype, **shape: Any) -> Task:
    """A Task on a device that is here; `shape`: its other fields."""
    cuda = device.type == "cuda" and torch.cuda.is_available()
    return Task(device, dtype, **shape, capability=torch.cuda.get_device_capability(device) if cuda else (0, 0))


FLASH_ATTN = ("flash_attn_func", "flash_attn_varlen_func")
"""What is called of flash-attn 2 and 3. (4 has another interface in the same namespace.)"""

Reason = Callable[[Task], str | None]


def _none(task: Task) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation."""

    refusal: Reason
    """Why it cannot serve a task, or None where it can."""
    function: Callable[..., Any]
    drawback: Reason = _none
    """Why `auto` passes over it where it can serve: it would be slow."""


@dataclass(frozen=True)
class Choice:
    """The backend that an operation takes, and why."""

    name: str
    function: Callable[..., Any]
    reason: str


@dataclass(frozen=True)
class Row:
    """A line of `explain`."""

    backend: str
    chosen: bool
    """Whether `auto` takes it."""
    refusal: str | None
    """Why it cannot serve; None where it can."""


def _not_on_cuda(task: Task) -> str | None:
    return None if task.device.type == "cuda" else f"it needs a CUDA device and this one is {task.device.type}"


def _not_bf16(task: Task) -> str | None:
    return None if task.dtype == torch.bfloat16 else f"it computes in bfloat16 and this is {_word(task.dtype)}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _older_than(major: int, task: Task, name: str) -> str | None:
    have = ".".join(map(str, task.capability))
    return None if task.capability >= (major, 0) else f"it needs {name} or newer, and this device has capability {have}"


def _triton(task: Task) -> str | None:
    known = task.dtype in (torch.bfloat16, torch.float32)
    other = None if known else f"it computes in bfloat16 and float32 and this is {_word(task.dtype)}"
    return _not_on_cuda(task) or _older_than(8, task, "an A100") or other or import_failure("triton", "triton")


def _triton_norm(task: Task) -> str | None:
    return _triton(task) or (f"it holds rows of 16384 and hidden is {task.hidden}" if task.hidden > 16384 else None)


def _apex(task: Task) -> str | None:
    missing = None if packages.nvidia_apex_available() else "NVIDIA's apex is not installed (github.com/NVIDIA/apex)"
    return _not_on_cuda(task) or missing or import_failure("fused_layer_norm_cuda", "apex, from github.com/NVIDIA/apex")


def _liger(task: Task) -> str | None:
    names = "LigerRMSNormFunction", "LigerSiLUMulFunction"
    return _triton(task) or import_failure("liger_kernel.ops", "'liger-kernel>=0.8'", *names)


def _flash_attn(task: Task) -> str | None:
    refusal = _not_on_cuda(task) or _older_than(8, task, "an A100") or _not_bf16(task) or _wider_heads(256, task)
    refusal = refusal or import_failure("flash_attn", "flash-attn", *FLASH_ATTN, "__version__")
    if refusal is not None:
        return refusal
    version = str(importlib.import_module("flash_attn").__version__)
    if Version(version) < Version("2.1"):
        return (
            f"{version} is installed and, where there are fewer queries than keys, its causal mask begins at the first "
            f"key and not at the last (pip install 'flash-attn>=2.1')"
        )
    return None


def _flash_attn_3(task: Task) -> str | None:
    other = None if task.capability[0] == 9 else "it is made for Hopper (H100, H200)"
    refusal = _not_on_cuda(task) or other or _not_bf16(task) or _wider_heads(256, task)
    return refusal or import_failure("flash_attn_interface", "flash_attn_3", *FLASH_ATTN)


def _triton_attention(task: Task) -> str | None:
    return _triton(task) or _wider_heads(128, task)


def _sdpa(task: Task) -> str | None:
    unaligned = None if task.head_dim % 8 == 0 else f"it needs a head_dim in eights and this is {task.head_dim}"
    packed = "it has no call for packed documents or parts of sequences" if task.segments else None
    return _not_on_cuda(task) or _older_than(8, task, "an A100") or _not_bf16(task) or unaligned or packed


def _sdpa_flash(task: Task) -> str | None:
    return _sdpa(task) or _wider_heads(256, task)


def _sdpa_cudnn(task: Task) -> str | None:
    missing = None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"
    return _sdpa(task) or _wider_heads(128, task) or missing


def _wider_heads(limit: int, task: Task) -> str | None:
    return f"its head_dim is at most {limit} and this is {task.head_dim}" if task.head_dim > limit else None


def _slow_on_hopper(task: Task) -> str | None:
    faster = task.capability[0] == 9 and _triton_attention(task) is None
    return "triton's is faster on Hopper" if faster else None


def _slow_off_hopper(task: Task) -> str | None:
    # transformers' pull request 48163: 1.7 to 2.3 times torch's flash attention on Hopper, 0.82 times on an A100, 0.88
    # times on Blackwell.
    return None if task.capability[0] == 9 else "torch's flash attention is faster on all but Hopper"


Table = dict[str, dict[str, Backend]]
"""Operation -> backends in the order in which `auto` prefers them; one of them serves everywhere, without drawback."""

# The last one is plain torch. The order of attention follows our figures of an H200, where ours is faster than torch's
# flash attention and slower than cuDNN, and published ones of what else there is (docs/benchmarks.md).
TABLE: Table = {
    "attention": {
        "flash_attn_3": Backend(_flash_attn_3, packages.attention_flash_3),
        "cudnn": Backend(_sdpa_cudnn, attention_cudnn, _slow_off_hopper),
        "flash_attn": Backend(_flash_attn, packages.attention_flash),
        "sdpa_flash": Backend(_sdpa_flash, attention_sdpa_flash, _slow_on_hopper),
        "triton": Backend(_triton_attention, attention_triton),
        "torch": Backend(_none, attention_torch),
    },
    "rope": {
        "triton": Backend(_triton, rope_triton),
        "torch": Backend(_none, rope_torch),
    },
    "rms_norm": {
        "triton": Backend(_triton_norm, rms_norm_triton),
        "apex": Backend(_apex, packages.rms_norm_apex),
        "liger": Backend(_liger, packages.rms_norm_liger),
        "torch": Backend(_none, rms_norm_torch),
    },
    "add_rms_norm": {
        "triton": Backend(_triton_norm, add_rms_norm_triton),
        "apex": Backend(_apex, packages.add_rms_norm_apex),
        "liger": Backend(_liger, packages.add_rms_norm_liger),
        "torch": Backend(_none, add_rms_norm_torch),
    },
    "cross_entropy": {
        "triton": Backend(_triton, cross_entropy_triton),
        "torch": Backend(_none, cross_entropy_torch),
    },
    "swiglu": {
        "triton": Backend(_triton, swiglu_triton),
        "liger": Backend(_liger, packages.swiglu_liger),
        "torch": Backend(_none, swiglu_torch),
    },
}


def choose(operation: str, task: Task, backend: str = "auto", table: Table = TABLE) -> Choice:
    """The function that computes `operation` for a task; `table`: of other operations than the kernels'.

    `auto` takes the first of the table that serves and has no drawback; its reason says what the ones before it lack.
    UnservableError when a backend asked for by name does not exist or cannot serve.
    """
    backends = table[operation]
    if backend != "auto":
        return _forced(operation, backends, backend, task)
    passed_over: dict[str, list[str]] = {}
    for name, candidate in backends.items():
        against = candidate.refusal(task) or candidate.drawback(task)
        if against is None:
            reasons = "; ".join(f"not {', '.join(names)}: {reason}" for reason, names in passed_over.items())
            return Choice(name, candidate.function, reasons or "the preferred one")
        passed_over.setdefault(against, []).append(name)
    raise AssertionError(f"{operation}: a backend of the table must serve everywhere")


def _forced(operation: str, backends: dict[str, Backend], backend: str, task: Task) -> Choice:
    if backend not in backends:
        raise UnservableError(f"{operation} has no backend '{backend}': take one of auto, {', '.join(backends)}")
    refusal = backends[backend].refusal(task)
    if refusal is not None:
        serving = [name for name, other in backends.items() if other.refusal(task) is None]
        raise UnservableError(
            f"backend '{backend}' of {operation} cannot serve here: {refusal}; mend that or take one of "
            f"auto, {', '.join(serving)}"
        )
    return Choice(backend, backends[backend].function, "asked for")


def choose_all(task: Task, backends: Mapping[str, str] | None = None) -> dict[str, Choice]:
    """A model's operations: each by the backend that `backends` names for it, or `auto`; sums follow their norms."""
    forced = dict(backends or {})
    forced["add_rms_norm"] = forced.get("rms_norm", "auto")
    return {operation: choose(operation, task, forced.get(operation, "auto")) for operation in TABLE}


def explain(operation: str, task: Task, table: Table = TABLE) -> list[Row]:
    """Every backend of an operation."""
    chosen = choose(operation, task, table=table).name
    return [Row(name, name == chosen, backend.refusal(task)) for name, backend in table[operation].items()]
