"""The kernels of norms and SwiGLU on a GPU: the cases that the interpreter computes on the CPU, and a model's sizes."""

import pytest
import torch
from support import kernels
from support.kernels import CASES, Case

from megacode.kernels.rms_norm import rms_norm_triton
from megacode.kernels.swiglu import swiglu_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Sizes of Code Llama 7B, 13B, 34B and 70B, and odd ones; norms of more rows than programs, and no multiple of them.
LARGE = [
    Case(operation, (3, 1367) if "norm" in operation else (3, 45), width, dtype)
    for operation, widths in {
        "rms_norm": (127, 4096, 5120, 8192, 16384),
        "add_rms_norm": (129, 4096, 5120, 8192, 16384),
        "swiglu": (1376, 11008, 13824),
        "swiglu_packed": (1376, 11008, 28672),
    }.items()
    for width in widths
    for dtype in (torch.bfloat16, torch.float32)
]


@pytest.mark.parametrize("case", [*CASES.values(), *LARGE], ids=[*CASES, *map(str, LARGE)])
def test_kernels_are_as_exact_as_the_twin_and_give_the_same_bits_again(case):
    actual = kernels.compute(case, "triton", "cuda")
    kernels.check(case, actual, "cuda")
    for again in (kernels.compute(case, "triton", "cuda") for _ in range(3)):
        assert all(map(torch.equal, actual, again))


@pytest.mark.parametrize(
    "function", [lambda x: rms_norm_triton(x, x[0], 1e-5), lambda x: swiglu_triton(x, x)], ids=["rms_norm", "swiglu"]
)
def test_a_second_derivative_is_refused(function):
    x = torch.randn(3, 64, device="cuda", requires_grad=True)
    (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_rows_past_2_to_31_elements_are_reached():
    rows = 2**31 // 8192 + 3
    if torch.cuda.mem_get_info()[0] < 4 * rows * 8192 * 2:
        pytest.skip("needs 17 GB of free GPU memory")
    x = torch.ones(rows, 8192, device="cuda", dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, 8192, device="cuda", dtype=torch.bfloat16)
    for function in (lambda y: rms_norm_triton(y, x[0], 1e-5), lambda y: swiglu_triton(y, y)):
        assert torch.equal(function(x)[-3:], function(x[-3:]))
