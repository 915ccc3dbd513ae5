"""SwiGLU of two tensors and of one that holds both: the kernels in Triton's interpreter and through its compiler."""

import pytest
import torch
from support import kernels
from support.kernels import CASES

from megacode.kernels import swiglu

OPERATIONS = ("swiglu", "swiglu_packed")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    pytest.importorskip("triton", reason="the interpreter is part of triton")
    return kernels.interpret(tmp_path_factory.mktemp("triton") / "interpreted.pt", *OPERATIONS)


@pytest.mark.parametrize("name", kernels.named(*OPERATIONS))
def test_kernels_are_as_exact_as_the_twin(interpreted, name):
    kernels.check(CASES[name], interpreted[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_is_that_of_transformers(dtype):
    from transformers.activations import ACT2FN

    packed = CASES["swiglu_packed-129-fp32"].inputs()[0].to(dtype)
    gate, up = packed[..., :129], packed[..., 129:]
    expected = ACT2FN["silu"](gate) * up
    assert torch.equal(swiglu.swiglu_torch(gate, up), expected)
    assert torch.equal(swiglu.swiglu_packed_torch(packed), expected)


def test_kept_for_backward_are_gate_and_up(interpreted):
    half, whole = (torch.bfloat16, (3, 5, 24)), (torch.bfloat16, (3, 5, 48))
    assert interpreted["saved"] == {"swiglu": [half, half], "swiglu_packed": [whole]}


def test_large_values_of_either_sign_give_finite_gradients(interpreted):
    """exp(-gate) overflows in fp32 below -88.7."""
    out, grad_gate, grad_up = interpreted["large"]
    gate = torch.tensor([-1e4, -200.0, -89.0, 89.0, 200.0, 1e4])
    expected = gate.clamp(min=0)
    for actual, value in ((out, 2 * expected), (grad_gate, 2 * (gate > 0).float()), (grad_up, expected)):
        torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-30)


def test_nothing_imports_triton_before_it_is_used(interpreted):
    assert interpreted["imported"] == []


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_for_hopper_and_as_many_fit_as_their_comment_says(dtype, tmp_path, monkeypatch):
    """The real compiler: types, 16-byte accesses, no spilled registers."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("gate", "up", "out", "grad", "grad_gate", "grad_up"), f"*{dtype}")
    for kernel, programs in ((swiglu._forward_kernel(), 16), (swiglu._backward_kernel(), 12)):
        ptx, registers, stack = kernels.resources(kernel, types, {"tile": swiglu._TILE}, 4, tmp_path)
        assert "ld.global.v4" in ptx
        assert "st.global.v4" in ptx
        assert stack == 0
        assert -(-registers // 8) * 8 * 128 * programs <= 65536
