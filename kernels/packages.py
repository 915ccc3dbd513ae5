"""Operations by packages that may be installed: flash-attn, NVIDIA's apex, Liger. None is imported before it is used.

By name, since type checkers seldom have them. What each function computes is said of its twin in plain torch.
"""

import importlib
import importlib.util
from pathlib import Path

from torch import Tensor

from megacode.kernels.attention import Segments


def import_failure(module: str, package: str, *names: str) -> str | None:
    """Why `module` of the PyPI package `package`, and these names in it, cannot be used; None if they can.

    It is imported: a wheel built for another torch is found but does not load, so looking for it is not enough.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"it is not installed (pip install {package})"
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a package that is broken may raise anything
        return f"it is installed but does not import: {' '.join(str(error).split())}"
    missing = [name for name in names if not hasattr(found, name)]
    return f"the installed one has no {module}.{missing[0]} (pip install {package})" if missing else None


def nvidia_apex_available() -> bool:
    """Whether the `apex` that would be imported is NVIDIA's, with a fused RMSNorm.

    PyPI's `apex` is an unrelated project whose import may fail, so the name alone proves nothing, and nothing is
    imported unless there is an `apex.normalization`, which only NVIDIA's has.
    """
    spec = importlib.util.find_spec("apex")  # finds a top-level package without importing it
    folders = (spec.submodule_search_locations if spec else None) or []
    if not any(Path(folder, "normalization", "__init__.py").is_file() for folder in folders):
        return False
    try:
        return hasattr(importlib.import_module("apex.normalization"), "FusedRMSNorm")
    except Exception:  # a package that is broken may raise anything
        return False


def attention_flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """`attention_torch` by flash-attn 2 (Dao 2023): CUDA and bf16 only.

    Since its version 2.1 the queries are the last of the keys' tokens, as here.
    """
    return _flash("flash_attn", q, k, v, segments)


def attention_flash_3(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """`attention_torch` by flash-attn 3 (Shah et al. 2024), the folder `hopper` of the same repository."""
    return _flash("flash_attn_interface", q, k, v, segments)


def _flash(module: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    package = importlib.import_module(module)
    if segments is None:
        result = package.flash_attn_func(q, k, v, causal=True)
    else:
        tokens = (x.flatten(0, 1) for x in (q, k, v))  # [batch * sequence, heads, head_dim]
        bounds = segments.cu_seqlens, segments.cu_seqlens_k, max(segments.lengths), max(segments.lengths_k)
        result = package.flash_attn_varlen_func(*tokens, *bounds, causal=True)
    # The first releases of 3 return the log-sum-exp as well.
    return (result[0] if isinstance(result, tuple) else result).view(q.shape)


def rms_norm_apex(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm_torch` by apex's FusedRMSNorm."""
    module = importlib.import_module("apex.normalization.fused_layer_norm")
    return module.fused_rms_norm_affine(x, weight, weight.shape, epsilon)


def rms_norm_liger(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm_torch` by Liger (Hsu et al. 2024)."""
    function = importlib.import_module("liger_kernel.ops").LigerRMSNormFunction
    # The last: not in place, since autograd may share the gradient that its backward would write over.
    return function.apply(x, weight, epsilon, 0.0, "llama", False)


def add_rms_norm_apex(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_torch` by torch's sum and apex's FusedRMSNorm."""
    total = x + residual
    return total, rms_norm_apex(total, weight, epsilon)


def add_rms_norm_liger(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_torch` by torch's sum and Liger."""
    total = x + residual
    return total, rms_norm_liger(total, weight, epsilon)


def swiglu_liger(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu_torch` by Liger. Backward writes over gate and up and does not tell autograd: it can be called once."""
    return importlib.import_module("liger_kernel.ops").LigerSiLUMulFunction.apply(gate, up)
