"""RMSNorm, with and without the residual sum: the kernels in Triton's interpreter and through its compiler, no GPU."""

import re

import pytest
import torch
from support import kernels
from support.kernels import CASES

from megacode.kernels import rms_norm as norm

OPERATIONS = ("rms_norm", "add_rms_norm")
REGISTERS = 65536
"""32-bit registers of a processor, of every NVIDIA GPU of the last ten years."""
ATOMIC = r"\b(atom|red)\."
"""PTX whose order varies from run to run."""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    pytest.importorskip("triton", reason="the interpreter is part of triton")
    return kernels.interpret(tmp_path_factory.mktemp("triton") / "interpreted.pt", *OPERATIONS)


@pytest.mark.parametrize("name", kernels.named(*OPERATIONS))
def test_kernels_are_as_exact_as_the_twin(interpreted, name):
    kernels.check(CASES[name], interpreted[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_is_that_of_transformers(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = CASES["rms_norm-129-fp32"].inputs()
    theirs = LlamaRMSNorm(129, eps=1e-5).to(dtype)
    with torch.no_grad():
        theirs.weight.copy_(weight)
        x = x.to(dtype)
        assert torch.equal(norm.rms_norm_torch(x, theirs.weight, 1e-5), theirs(x))


def test_the_sum_comes_with_the_norm_of_the_sum_as_it_is_kept():
    x, residual, weight = CASES["add_rms_norm-129-bf16"].inputs()
    total, normed = norm.add_rms_norm_torch(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, norm.rms_norm_torch(total, weight, 1e-5))


def test_kept_for_backward_are_the_input_or_sum_the_weight_and_the_roots(interpreted):
    expected = [(torch.bfloat16, (3, 5, 24)), (torch.bfloat16, (24,)), (torch.float32, (15,))]
    assert interpreted["saved"] == {"rms_norm": expected, "add_rms_norm": expected}


def test_nothing_imports_triton_before_it_is_used(interpreted):
    assert interpreted["imported"] == []


@pytest.mark.parametrize(
    ("hidden", "dtype", "add"),
    [(4096, "bf16", False), (5120, "bf16", True), (8192, "bf16", True), (129, "fp32", False)],
)
def test_kernels_compile_for_hopper_and_as_many_fit_as_their_grid_counts_on(hidden, dtype, add, tmp_path, monkeypatch):
    """The real compiler: types, 16-byte accesses, no spilled registers, and nothing whose order could vary."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    narrow = ("x", "residual", "weight", "total", "normed", "grad", "grad_total", "grad_x")
    types = dict.fromkeys(narrow, f"*{dtype}") | {"root": "*fp32", "partials": "*fp32", "epsilon": "fp32"}
    row = torch.empty(1, hidden, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    absent = {} if add else dict.fromkeys(("residual", "total", "grad_total"))
    for kernel, resident in (
        (norm._forward_kernel(), norm._FORWARD_WARPS),
        (norm._backward_kernel(), norm._BACKWARD_WARPS),
    ):
        tile, warps, _ = norm._layout(hidden, resident, row)
        constants = {"hidden": hidden, "tile": tile} | {key: None for key in absent if key in kernel.arg_names}
        given = {key: kind for key, kind in types.items() if key not in absent}
        ptx, registers, stack = kernels.resources(kernel, given, constants, warps, tmp_path)
        assert not re.search(ATOMIC, ptx)
        if hidden > 129:
            assert "ld.global.v4" in ptx
            assert "st.global.v4" in ptx
            assert stack == 0
            assert registers * 32 * resident <= REGISTERS


def test_the_sum_over_programs_compiles_for_hopper(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types, constants = {"partials": "*fp32", "out": "*bf16"}, {"rows_tile": 128, "columns_tile": 32}
    ptx, _, stack = kernels.resources(norm._sum_kernel(), types, constants, 4, tmp_path)
    assert "ld.global.v4" in ptx
    assert not re.search(ATOMIC, ptx)
    assert stack == 0
