"""RoPE's compiled kernel against the definition in float64."""

import pytest
import torch
from support import rope
from support.rope import CASES, Case

from megacode.kernels.rope import rope_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


# Heads and kv_heads of Code Llama 7B, 13B and 34B, and of one rank of eight of 70B.
LARGE = {
    f"{heads}_{kv_heads}_{word}": Case(heads, kv_heads, 128, dtype, sequence=513)
    for heads, kv_heads in [(32, 32), (40, 40), (64, 8), (8, 1)]
    for word, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
}


@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_rope_triton_is_the_definition_and_gives_the_same_bits_again(name):
    case = (CASES | LARGE)[name]
    actual = rope.compute(rope_triton, case, "cuda")
    rope.check(case, actual, "cuda")
    for again in (rope.compute(rope_triton, case, "cuda") for _ in range(3)):
        assert all(torch.equal(again[key], value) for key, value in actual.items())


def test_whoever_needs_the_unrotated_values_gets_an_error():
    q, k = (torch.randn(2, 33, 256, device="cuda", requires_grad=True) for _ in range(2))
    given = [x * 1 for x in (q, k)]
    square = given[0].square()
    rope_triton(*given, torch.arange(33, device="cuda").expand(2, 33), 1e4, 64)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def test_rope_triton_reaches_rows_past_2_to_31_elements():
    rows, width = 2**31 // 8192 + 3, 8192
    if torch.cuda.mem_get_info()[0] < 3 * rows * width * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    q = torch.ones(1, rows, width, device="cuda", dtype=torch.bfloat16)
    k = torch.ones(1, rows, 128, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(rows, device="cuda")[None]
    last = [x[:, -3:].clone() for x in (q, k)]
    whole = rope_triton(q, k, positions, 1e6, 128)
    for x, y in zip(whole, rope_triton(*last, positions[:, -3:], 1e6, 128), strict=True):
        assert torch.equal(x[:, -3:], y)
