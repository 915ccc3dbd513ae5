"""Rotary positions: the twin against transformers, the kernel in Triton's interpreter and compiler, both in place."""

import re

import pytest
import torch
from support import kernels, rope
from support.rope import CASES
from support.triton_offline import interpret
from torch import Tensor

from megacode.kernels import rope as module
from megacode.kernels import rows
from megacode.kernels.rope import inverse_frequencies, rope_torch

REGISTERS = 65536
"""32-bit registers of a processor."""


def llama_rope(q: Tensor, k: Tensor, positions: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """transformers' own rotation."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=q.shape[2],
        num_attention_heads=q.shape[2] // head_dim,
        num_key_value_heads=k.shape[2] // head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    q, k = (x.unflatten(-1, (-1, head_dim)) for x in (q, k))
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Every case computed by the Triton kernel in a process of its own, under the interpreter."""
    pytest.importorskip("triton", reason="the interpreter is part of triton")
    return interpret("support.rope", tmp_path_factory.mktemp("triton") / "interpreted.pt")


@pytest.fixture(scope="module")
def twin():
    return {"contract": rope.contract(rope_torch)}


@pytest.mark.parametrize("name", CASES)
def test_the_twin_is_the_definition(name):
    rope.check(CASES[name], rope.compute(rope_torch, CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_definition(interpreted, name):
    rope.check(CASES[name], interpreted[name])


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_the_twin_make_no_difference(monkeypatch, name):
    whole = rope.compute(rope_torch, CASES[name])
    monkeypatch.setattr(rows, "CACHED_ELEMENTS", 1)
    for key, value in rope.compute(rope_torch, CASES[name]).items():
        assert torch.equal(value, whole[key])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float32 and case.batch])
def test_the_twin_is_that_of_transformers(name):
    case = CASES[name]
    ours = rope.compute(rope_torch, case)
    q, k, positions = case.inputs()
    theirs = llama_rope(q, k, positions, case.theta, case.head_dim)
    grads = torch.autograd.grad(theirs, (q, k), rope.weights(theirs))
    for key, value in zip(("q", "k", "grad_q", "grad_k"), (*(x.flatten(-2) for x in theirs), *grads), strict=True):
        # The same fp32 products and sums; 1e-6 leaves room for two units in the last place of values up to 4.
        torch.testing.assert_close(ours[key], value.detach(), rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_the_twin_in_bf16_rounds_once():
    case = CASES["bf16"]
    q, k, positions = (x.detach() for x in case.inputs())
    exact = llama_rope(q.float(), k.float(), positions, 1e6, 128)
    theirs = llama_rope(q, k, positions, 1e6, 128)
    ours = rope_torch(q.clone(), k.clone(), positions, 1e6, 128)
    for x, mine, right, other in zip((q, k), ours, exact, theirs, strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, right.bfloat16())
        # transformers rounds cos, sin, each product and the sum: five relative errors of 2^-9, each of at most
        # |first| + |second|, and ours adds one.
        first, second = x.float().unflatten(-1, (-1, 128)).abs().chunk(2, dim=-1)
        bound = 6 * 2**-9 * torch.cat((first + second, first + second), dim=-1)
        assert ((mine.float() - other.float()).abs() <= bound).all()


@pytest.mark.parametrize("position", [0, 1, 4096, 99_999, 100_000, 2**20])
def test_the_twin_turns_unit_vectors_by_the_angle(position):
    frequencies = inverse_frequencies(64, 1e6, torch.device("cpu"))
    angles = (torch.tensor(float(position)) * frequencies).double()  # the fp32 product, in double from here
    unit = torch.cat((torch.ones(32), torch.zeros(32))).view(1, 1, 64)
    out, _ = rope_torch(unit.clone(), unit.clone(), torch.tensor([[position]]), 1e6, 64)
    expected = torch.cat((angles.cos(), angles.sin()))
    # fp32 sine and cosine with a full range reduction: within two units in the last place of 1.
    torch.testing.assert_close(out.flatten().double(), expected, rtol=0, atol=1.2e-7)


# ---- in place


@pytest.mark.parametrize("by", ["twin", "interpreted"])
def test_whoever_needs_the_unrotated_values_gets_an_error(by, request):
    """And not the gradient of rotated ones."""
    errors = request.getfixturevalue(by)["contract"]["errors"]
    assert "has been modified by an inplace operation" in errors["needed"]
    assert "has been modified by an inplace operation" in errors["part needed"]
    assert "a leaf Variable that requires grad has been used in an in-place operation" in errors["leaves"]
    assert "modifies inplace an input that is a view" in errors["views"]
    assert "modifies inplace an input that is a view" in errors["a view"]
    assert "differentiate twice" in errors["twice"]


@pytest.mark.parametrize("by", ["twin", "interpreted"])
def test_only_the_positions_are_kept(by, request):
    (kept,) = request.getfixturevalue(by)["contract"]["kept"]
    assert torch.equal(kept, CASES["bf16"].inputs()[2])


@pytest.mark.parametrize("by", ["twin", "interpreted"])
@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_without_gradients_views_are_rotated_too(by, mode, request):
    expected = rope.compute(rope_torch, CASES["bf16"])
    for key, value in request.getfixturevalue(by)["contract"][mode].items():
        torch.testing.assert_close(value, expected[key], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("by", ["twin", "interpreted"])
def test_a_gradient_that_others_get_too_is_left_alone(by, request):
    grad_q, grad_other = request.getfixturevalue(by)["contract"]["shared"]
    assert torch.equal(grad_other, rope.weights((grad_other,))[0])
    expected = rope.compute(rope_torch, CASES["multi_head"])["grad_q"]
    torch.testing.assert_close(grad_q, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("by", ["twin", "interpreted"])
def test_a_model_has_the_same_gradients_whatever_it_computes_again(by, request, twin):
    models = request.getfixturevalue(by)["contract"]["models"]
    assert models.keys() == {"none", "selective", "full"}
    for found in models.values():
        for name, value in twin["contract"]["models"]["none"].items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


# ---- the compiler


def test_nothing_imports_triton_before_it_is_used(interpreted):
    assert interpreted["imported"] == []


@pytest.mark.parametrize(("head_dim", "dtype"), [(128, "bf16"), (96, "bf16"), (64, "bf16"), (128, "fp32")])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_kernel_compiles_for_hopper(head_dim, dtype, inverse, tmp_path, monkeypatch):
    """The real compiler: 16-byte accesses, the accurate sine, no exchange between threads and no spilled registers."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(("q", "k", "q_out", "k_out"), f"*{dtype}") | {"positions": "*i64", "frequencies": "*fp32"}
    constants = module._tile(head_dim // 2) | {"inverse": inverse}
    ptx, registers, stack = kernels.resources(module._kernel(), types, constants, module._WARPS, tmp_path)
    assert "__nv_sinf" in ptx
    assert "sin.approx" not in ptx
    assert "cos.approx" not in ptx
    accesses = re.findall(r"(ld|st)\.global\.((?:v\d\.)?b\d+)", ptx)
    assert {word for word in accesses if word != ("ld", "b64")} == {
        ("ld", "v4.b32"),
        ("st", "v4.b32"),
    }  # b64: positions
    assert "st.shared" not in ptx
    assert "bar.sync" not in ptx
    # Sines of large angles multiply by 2 / pi in 28 bytes of local memory: no more than these are there.
    assert re.findall(r"__local_depot0\[(\d+)\]", ptx)[0] == "28"
    assert stack == 32
    # Eight programs of a processor, 32 warps, in bf16, which have 32 KB of reads on their way; five in fp32: 40 KB.
    assert registers * 32 * module._WARPS * {"bf16": 7, "fp32": 5}[dtype] <= REGISTERS
