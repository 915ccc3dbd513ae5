"""Attention and the choice of backends, on the CPU."""

import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megacode.errors import UserError
from megacode.kernels import dispatch
from megacode.kernels.attention import Segments, attention_flash, attention_torch
from megacode.kernels.rope import rope_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# ---- attention


def attention_loop(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> Tensor:
    """The definition, one query of one head at a time."""
    batch, sequence, heads, head_dim = q.shape
    group = heads // k.shape[2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    rows = []
    for start, end in itertools.pairwise(bounds):
        for i in range(start, end):
            for head in range(heads):
                keys, values = k[start : i + 1, head // group], v[start : i + 1, head // group]
                rows.append((keys @ q[i, head] / head_dim**0.5).softmax(dim=0) @ values)
    return torch.stack(rows).view(batch, sequence, heads, head_dim)


@st.composite
def packed(draw):
    """(batch, sequence, heads, kv_heads, bounds or None): segments may be empty and may cross rows."""
    batch, sequence = draw(st.integers(1, 2)), draw(st.integers(1, 9))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    inner = draw(st.none() | st.lists(st.integers(0, batch * sequence), max_size=4))
    bounds = None if inner is None else [0, *sorted(inner), batch * sequence]
    return batch, sequence, kv_heads * group, kv_heads, bounds


@settings(max_examples=40, deadline=None)
@given(packed(), st.integers(0, 2**31))
def test_attention_torch_is_the_definition(shape, seed):
    batch, sequence, heads, kv_heads, bounds = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, sequence, count, 8, generator=generator, requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    )
    out = attention_torch(q, k, v, None if bounds is None else Segments.between(bounds))
    rows = list(range(0, batch * sequence + 1, sequence))
    expected = attention_loop(q, k, v, rows if bounds is None else bounds)
    # Means of at most 18 values up to 4: fp32's 6e-8 times a handful of roundings.
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    weights = torch.randn(out.shape, generator=generator)
    grads, expected_grads = (torch.autograd.grad(x, (q, k, v), weights) for x in (out, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        # Sums over up to 18 queries and 3 heads of products of three such values.
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bounds", [None, [0, 100, 101, 700, 1024]])
def test_attention_torch_in_bf16_has_softmax_in_fp32(bounds):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 512, heads, 32, generator=generator).bfloat16() for heads in (4, 2, 2))
    segments = None if bounds is None else Segments.between(bounds)
    out = attention_torch(q, k, v, segments)
    expected = attention_torch(q.float(), k.float(), v.float(), segments)
    assert out.dtype == torch.bfloat16
    # Weights and the result are rounded to bf16 (2^-9 relative each) of values up to max |v|; a softmax that sums 512
    # terms in bf16 (8 bits) would be off by a large part of itself.
    assert (out.float() - expected).abs().max() <= 2 * 2**-9 * v.float().abs().max()


# A stand-in for the flash-attn package with its signatures (Dao-AILab/flash-attention, flash_attn_interface.py, 2.x).
FLASH_ATTN = """
__version__ = "2.8.3"

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2]) if causal else None
    return sdpa(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (max_seqlen_q, max_seqlen_k) == (8, 8 if torch.equal(cu_seqlens_q, cu_seqlens_k) else 11)
    bounds = zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:])
    parts = [flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], causal=causal) for a, b, c, d in bounds]
    return torch.cat(parts, dim=1)[0]
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules that are found before any installed ones, and forgets them afterwards."""

    tops = ("apex", "flash_attn", "normalization")

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in tops]

    def write(files: dict[str, str]) -> None:
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        for name in loaded():
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)

    yield write
    for name in loaded():
        del sys.modules[name]


@pytest.mark.parametrize("bounds", [None, [0, 3, 10, 10, 18, 20]])
def test_attention_flash_calls_the_package_rightly(package, bounds):
    package({"flash_attn.py": FLASH_ATTN})
    q, k, v = (torch.randn(2, 10, heads, 8) for heads in (4, 2, 2))
    segments = None if bounds is None else Segments.between(bounds)
    torch.testing.assert_close(attention_flash(q, k, v, segments), attention_torch(q, k, v, segments))


@pytest.mark.parametrize("attention", [attention_torch, attention_flash])
def test_queries_may_be_the_last_tokens_of_what_the_keys_are_of(package, attention):
    """As under context parallelism: the same as the last rows of the whole attention."""
    package({"flash_attn.py": FLASH_ATTN})
    q, k, v = (torch.randn(2, 10, heads, 8) for heads in (4, 2, 2))
    torch.testing.assert_close(attention(q[:, 7:], k, v, None), attention_torch(q, k, v, None)[:, 7:])
    whole = [0, 3, 14, 20]
    kept = [
        1,
        2,
        *range(6, 14),
        *range(14, 20),
    ]  # the first segment's last two tokens, the second's last eight, a third
    few = Segments.between([0, 2, 10, 16], whole)
    expected = attention_torch(q, k, v, Segments.between(whole)).flatten(0, 1)[kept]
    torch.testing.assert_close(attention(q.flatten(0, 1)[kept][None], k, v, few)[0], expected)


# ---- dispatch


@pytest.mark.parametrize("operation", dispatch.TABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_takes_torch_and_says_why(operation, dtype):
    choice = dispatch.choose(operation, device=CPU, dtype=dtype)
    assert choice.name == "torch"
    assert choice.function is dispatch.TABLE[operation]["torch"].function
    assert "it needs a CUDA device and this one is cpu" in choice.reason
    assert dispatch.choose(operation, "torch", device=CPU, dtype=dtype).function is choice.function


def test_cuda_takes_triton_for_rope():
    pytest.importorskip("triton")
    assert dispatch.choose("rope", device=CUDA, dtype=torch.bfloat16).function is rope_triton


def test_a_backend_that_cannot_serve_is_refused_with_the_mend():
    with pytest.raises(UserError, match="'triton' of rope cannot serve here: it needs a CUDA device") as error:
        dispatch.choose("rope", "triton", device=CPU, dtype=torch.float32)
    assert "take one of auto, torch" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="rope has no backend 'cuda': take one of auto, triton, torch"):
        dispatch.choose("rope", "cuda", device=CPU, dtype=torch.float32)


def test_flash_attn_serves_cuda_in_bf16_only(package):
    package({"flash_attn.py": FLASH_ATTN})
    assert dispatch.choose("attention", device=CUDA, dtype=torch.bfloat16).function is attention_flash
    choice = dispatch.choose("attention", device=CUDA, dtype=torch.float32)
    assert (choice.name, choice.reason) == ("torch", "not flash_attn: it computes in bfloat16 and this is float32")


@pytest.mark.parametrize(("version", "serves"), [("2.0.9", False), ("1.0.9", False), ("2.1.0", True), ("2.10.0", True)])
def test_flash_attn_that_aligns_masks_to_the_first_key_is_refused(package, version, serves):
    package({"flash_attn.py": FLASH_ATTN.replace("2.8.3", version)})
    choice = dispatch.choose("attention", device=CUDA, dtype=torch.bfloat16)
    assert (choice.name == "flash_attn") == serves
    if not serves:
        assert choice.reason.startswith(f"not flash_attn: {version} is installed and, where there are fewer queries")
        assert choice.reason.endswith("(pip install 'flash-attn>=2.1')")
        with pytest.raises(UserError, match="its causal mask begins at the first key and not at the last") as error:
            dispatch.choose("attention", "flash_attn", device=CUDA, dtype=torch.bfloat16)
        assert "\n" not in str(error.value)


def test_flash_attn_that_does_not_load_is_passed_over_aloud(package):
    package({"flash_attn.py": "raise ImportError('flash_attn_2_cuda.so:\\n undefined symbol')"})
    choice = dispatch.choose("attention", device=CUDA, dtype=torch.bfloat16)
    assert choice.name == "torch"
    assert "installed but does not import: flash_attn_2_cuda.so: undefined symbol" in choice.reason


def test_explain_has_a_row_for_every_backend():
    rows = {(row.operation, row.backend): row for row in dispatch.explain(CPU)}
    assert set(rows) == {(operation, name) for operation, backends in dispatch.TABLE.items() for name in backends}
    assert rows["rope", "torch"] == dispatch.Row("rope", "torch", chosen=True, refusal=None)
    assert not rows["rope", "triton"].chosen
    assert "cpu" in rows["rope", "triton"].refusal


RMS_NORM = "class FusedRMSNorm: pass"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # PyPI's: importing it fails for want of its web framework.
        ({"apex/__init__.py": "import no_such_web_framework", "apex/views.py": ""}, False),
        # A module, not a package, next to an unrelated top-level `normalization`.
        ({"apex.py": "raise RuntimeError", "normalization/__init__.py": RMS_NORM}, False),
        # Folders that are not packages.
        ({"apex/normalization/readme.py": RMS_NORM}, False),
        # NVIDIA's from before FusedRMSNorm, and the real one.
        ({"apex/__init__.py": "", "apex/normalization/__init__.py": "class FusedLayerNorm: pass"}, False),
        ({"apex/__init__.py": "", "apex/normalization/__init__.py": RMS_NORM}, True),
    ],
    ids=["pypi", "module", "folder", "old", "nvidia"],
)
def test_only_the_apex_of_nvidia_counts(package, files, expected):
    package(files)
    assert dispatch.nvidia_apex_available() is expected
    if "apex/normalization/__init__.py" not in files:
        assert "apex" not in sys.modules
