"""Which backend computes an operation here: one table, one choice, one explanation. Imports no backend until asked."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from megacode.errors import UserError
from megacode.kernels.attention import attention_flash, attention_torch
from megacode.kernels.rope import rope_torch, rope_triton


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation."""

    refusal: Callable[[torch.device, torch.dtype], str | None]
    """Why it cannot serve on this device with this dtype, or None where it can."""
    function: Callable[..., Any]


@dataclass(frozen=True)
class Choice:
    """The backend that an operation takes, and why."""

    name: str
    function: Callable[..., Any]
    reason: str


@dataclass(frozen=True)
class Row:
    """A line of `explain`: a backend of an operation, whether `auto` takes it, why it cannot serve (None: it can)."""

    operation: str
    backend: str
    chosen: bool
    refusal: str | None


def _always(device: torch.device, dtype: torch.dtype) -> None:
    return None


def _triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device and this one is {device.type}"
    return _import_failure("triton", "triton")


def _flash_attn_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device and this one is {device.type}"
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16 and this is {str(dtype).removeprefix('torch.')}"
    failure = _import_failure("flash_attn", "flash-attn")
    if failure is not None:
        return failure
    version = str(importlib.import_module("flash_attn").__version__)
    if Version(version) < Version("2.1"):
        return (
            f"{version} is installed and, where there are fewer queries than keys, its causal mask begins at the first "
            f"key and not at the last (pip install 'flash-attn>=2.1')"
        )
    return None


def _import_failure(module: str, package: str) -> str | None:
    """Imports `module`: a wheel built for another torch is found but does not load, so looking for it is not enough."""
    if importlib.util.find_spec(module) is None:
        return f"it is not installed (pip install {package})"
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return f"it is installed but does not import: {' '.join(str(error).split())}"
    return None


Table = dict[str, dict[str, Backend]]
"""Operation -> backends in the order in which `auto` prefers them; one of them serves everywhere."""

# The last one is plain torch.
TABLE: Table = {
    "rope": {
        "triton": Backend(_triton_refusal, rope_triton),
        "torch": Backend(_always, rope_torch),
    },
    "attention": {
        "flash_attn": Backend(_flash_attn_refusal, attention_flash),
        "torch": Backend(_always, attention_torch),
    },
}


def choose(
    operation: str, backend: str = "auto", *, device: torch.device, dtype: torch.dtype, table: Table = TABLE
) -> Choice:
    """The function that computes `operation` on `device` with tensors of `dtype`.

    `auto` takes the first of the table that serves; its reason says what the ones before it lack. UserError when a
    backend asked for by name does not exist or cannot serve here. `table`: of other operations than the kernels'.
    """
    backends = table[operation]
    if backend != "auto":
        return _forced(operation, backends, backend, device, dtype)
    passed_over: list[str] = []
    for name, candidate in backends.items():
        refusal = candidate.refusal(device, dtype)
        if refusal is None:
            return Choice(name, candidate.function, "; ".join(passed_over) or "the preferred one")
        passed_over.append(f"not {name}: {refusal}")
    raise AssertionError(f"{operation}: a backend of the table must serve everywhere")


def _forced(
    operation: str, backends: dict[str, Backend], backend: str, device: torch.device, dtype: torch.dtype
) -> Choice:
    if backend not in backends:
        raise UserError(f"{operation} has no backend '{backend}': take one of auto, {', '.join(backends)}")
    refusal = backends[backend].refusal(device, dtype)
    if refusal is not None:
        serving = [name for name, other in backends.items() if other.refusal(device, dtype) is None]
        raise UserError(
            f"backend '{backend}' of {operation} cannot serve here: {refusal}; mend that or take one of "
            f"auto, {', '.join(serving)}"
        )
    return Choice(backend, backends[backend].function, "asked for")


def explain(device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16, table: Table = TABLE) -> list[Row]:
    """Every backend of every operation, for `device` (the current CUDA device if there is one, else the CPU)."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        Row(operation, name, name == chosen.name, backend.refusal(device, dtype))
        for operation, backends in table.items()
        for chosen in [choose(operation, device=device, dtype=dtype, table=table)]
        for name, backend in backends.items()
    ]


def nvidia_apex_available() -> bool:
    """Whether the `apex` that would be imported is NVIDIA's, with its fused RMSNorm.

    PyPI's `apex` is an unrelated project whose import may fail, so the name alone proves nothing, and nothing is
    imported unless there is an `apex.normalization`, which only NVIDIA's has.
    """
    spec = importlib.util.find_spec("apex")  # finds a top-level package without importing it
    folders = (spec.submodule_search_locations if spec else None) or []
    if not any(Path(folder, "normalization", "__init__.py").is_file() for folder in folders):
        return False
    try:
        return hasattr(importlib.import_module("apex.normalization"), "FusedRMSNorm")
    except (ImportError, OSError):
        return False
