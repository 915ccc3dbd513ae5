"""The CUDA backends of rope and attention against their twins on the same device."""

import importlib.util

import pytest
import torch

from megacode.kernels import dispatch
from megacode.kernels.attention import Segments, attention_flash, attention_torch
from megacode.kernels.rope import rope_torch, rope_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


# Heads and kv_heads of Code Llama 7B, 13B and 34B, and of one rank of eight of 70B.
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (40, 40), (64, 8), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_triton(heads, kv_heads, dtype):
    torch.manual_seed(0)
    fused = torch.randn(2, 513, heads + kv_heads, 128, device="cuda", dtype=dtype, requires_grad=True)
    positions = torch.randint(0, 100_001, (2, 513), device="cuda")
    outs, grads = [], []
    for rope in (rope_triton, rope_torch):
        out = torch.cat(rope(*fused.split([heads, kv_heads], dim=2), positions, 1e6), dim=2)
        outs.append(out)
        grads.append(torch.autograd.grad(out, fused, torch.linspace(-2, 2, out.numel(), device="cuda").view_as(out))[0])
    # Both compute in fp32, with fused multiply-adds on one side: a few units in the last place of values up to 5. In
    # bf16 such a difference may turn a rounding: one unit in the last place, 2^-7 relative.
    rtol = 2**-7 if dtype == torch.bfloat16 else 0
    for actual, expected in (outs, grads):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=2e-6)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("bounds", [None, [0, 1, 700, 1024, 2048]])
def test_attention_flash(bounds):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 1024, heads, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)
    )
    segments = None if bounds is None else Segments.between(bounds).to(torch.device("cuda"))
    exact = attention_torch(q.float(), k.float(), v.float(), segments)
    weights = torch.randn_like(exact)
    exact_grads = torch.autograd.grad(exact, (q, k, v), weights)
    errors = []
    for attention in (attention_flash, attention_torch):
        out = attention(q, k, v, segments)
        grads = torch.autograd.grad(out, (q, k, v), weights.bfloat16())
        pairs = zip((out, *grads), (exact, *exact_grads), strict=True)
        errors.append([(x.float() - y.float()).abs().max().item() for x, y in pairs])
    # Both round the weights and the results to bf16, in different orders: as far from exact as the twin, within twice.
    for flash, twin in zip(*errors, strict=True):
        assert flash <= 2 * twin + 1e-3


def test_auto_takes_triton_for_rope():
    assert dispatch.choose("rope", device=torch.device("cuda"), dtype=torch.bfloat16).name == "triton"
