"""rope, attention and the choice of their backends, on the CPU.

This file is also a program: `python -m unit.test_kernels FILE` computes every case of CASES with rope_triton, under
Triton's interpreter, and saves the tensors to FILE.
"""

import itertools
import sys
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.triton_offline import interpret
from torch import Tensor

from megacode.kernels import dispatch, packages
from megacode.kernels.attention import Segments, attention_torch
from megacode.kernels.dispatch import UnservableError
from megacode.kernels.packages import attention_flash, attention_flash_3
from megacode.kernels.rope import inverse_frequencies, rope_torch, rope_triton
from megacode.recipe import KernelsSection

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@dataclass(frozen=True)
class Case:
    """Inputs of rope, as the projections of a model give them."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    layout: str = "plain"
    """plain; fused: views of one projection; sequence_first: transposed views, the positions one expanded row."""
    theta: float = 1e6

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k that require gradients and positions from 0 to 100,000; the same numbers in every process."""
        generator = torch.Generator().manual_seed(0)
        batch, sequence = 2, 5
        widths = [self.heads * self.head_dim, self.kv_heads * self.head_dim]
        fused = torch.randn(batch, sequence, sum(widths), generator=generator).to(self.dtype)
        q, k = (x.unflatten(-1, (-1, self.head_dim)) for x in fused.split(widths, dim=-1))
        positions = torch.tensor([[0, 1, 4097, 16384, 100_000], [99_999, 7, 0, 65_537, 31_337]])
        if self.layout == "plain":
            q, k = q.contiguous(), k.contiguous()
        if self.layout == "sequence_first":
            q, k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
            positions = positions[:1].expand(batch, sequence)
        return q.detach().requires_grad_(), k.detach().requires_grad_(), positions


CASES = {
    "multi_head": Case(4, 4, 64),
    "grouped": Case(8, 2, 32, theta=1e4),
    "odd_sizes": Case(5, 3, 48),
    "fused": Case(4, 2, 16, layout="fused"),
    "sequence_first": Case(4, 2, 16, layout="sequence_first"),
    "bf16": Case(4, 2, 128, torch.bfloat16),
}


def rotate_and_differentiate(rope, case: Case) -> dict[str, Tensor]:
    """What `rope` makes of a case: q, k, their gradients under weights and under a sum (an expanded gradient)."""
    q, k, positions = case.inputs()
    q_out, k_out = rope(q, k, positions, case.theta)
    weights = [torch.linspace(-2, 2, x.numel()).view(x.shape).to(x.dtype) for x in (q_out, k_out)]
    grads = torch.autograd.grad((q_out, k_out), (q, k), weights, retain_graph=True)
    (grad_of_sum,) = torch.autograd.grad(q_out.sum(), q)
    assert q_out.is_contiguous()
    return dict(zip(("q", "k", "grad_q", "grad_k", "grad_of_sum"), (q_out, k_out, *grads, grad_of_sum), strict=True))


# ---- rope


def llama_rope(q: Tensor, k: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """transformers' own rotation."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=q.shape[2] * q.shape[3],
        num_attention_heads=q.shape[2],
        num_key_value_heads=k.shape[2],
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float32])
def test_rope_torch_is_that_of_transformers(name):
    ours, theirs = (rotate_and_differentiate(rope, CASES[name]) for rope in (rope_torch, _contiguous(llama_rope)))
    for key, value in ours.items():
        # The same fp32 products and sums; 1e-6 leaves room for two units in the last place of values up to 4.
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def _contiguous(rope):
    return lambda *arguments: tuple(x.contiguous() for x in rope(*arguments))


def test_rope_torch_in_bf16_rounds_once():
    q, k, positions = CASES["bf16"].inputs()
    ours = rope_torch(q, k, positions, 1e6)
    exact = llama_rope(q.float(), k.float(), positions, 1e6)
    theirs = llama_rope(q, k, positions, 1e6)
    for x, mine, right, other in zip((q, k), ours, exact, theirs, strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, right.bfloat16())
        # transformers rounds cos, sin, each product and the sum: five relative errors of 2^-9, each of at most
        # |first| + |second|, and ours adds one.
        first, second = x.detach().float().abs().chunk(2, dim=-1)
        bound = 6 * 2**-9 * torch.cat((first + second, first + second), dim=-1)
        assert ((mine.float() - other.float()).abs() <= bound).all()


@pytest.mark.parametrize("position", [0, 1, 4096, 99_999, 100_000])
def test_rope_torch_turns_unit_vectors_by_the_angle(position):
    frequencies = inverse_frequencies(64, 1e6, CPU)
    angles = (torch.tensor(float(position)) * frequencies).double()  # the fp32 product, in double from here
    unit = torch.cat((torch.ones(32), torch.zeros(32))).view(1, 1, 1, 64)
    out, _ = rope_torch(unit, unit, torch.tensor([[position]]), 1e6)
    expected = torch.cat((angles.cos(), angles.sin()))
    # fp32 sine and cosine with a full range reduction: within two units in the last place of 1.
    torch.testing.assert_close(out.flatten().double(), expected, rtol=0, atol=1.2e-7)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Every case computed by the Triton kernel in a process of its own, under the interpreter."""
    pytest.importorskip("triton", reason="the interpreter is part of triton")
    return interpret("unit.test_kernels", tmp_path_factory.mktemp("triton") / "interpreted.pt")


@pytest.mark.parametrize("name", CASES)
def test_rope_triton_equals_its_twin(interpreted, name):
    expected = rotate_and_differentiate(rope_torch, CASES[name])
    # fp32: numpy's and torch's sines differ by a unit in the last place, 6e-8, times values up to 4, twice.
    # bf16: the interpreter cuts fp32 off to bf16 where hardware rounds: up to a unit in the last place, 2^-7 relative.
    rtol = 2**-7 if CASES[name].dtype == torch.bfloat16 else 0
    for key, value in expected.items():
        actual = interpreted[name][key]
        assert actual.dtype == value.dtype
        torch.testing.assert_close(actual, value, rtol=rtol, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_rope_triton_saves_the_positions_only(interpreted):
    _, _, positions = CASES["fused"].inputs()
    assert len(interpreted["saved"]) == 1
    assert torch.equal(interpreted["saved"][0], positions)


def test_nothing_imports_a_backend_before_it_is_used(interpreted):
    assert interpreted["imported"] == []


@pytest.mark.parametrize(("heads", "kv_heads", "dtype"), [(32, 32, "bf16"), (64, 8, "bf16"), (5, 5, "fp32")])
def test_rope_triton_compiles_for_hopper(heads, kv_heads, dtype, tmp_path, monkeypatch):
    """The real compiler, which needs no GPU: types, 16-byte accesses, and the accurate sine and cosine."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megacode.kernels.rope import _kernel, _power_of_two

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = _kernel()
    pointers = dict.fromkeys(("q", "k", "q_out", "k_out"), f"*{dtype}") | {"positions": "*i64", "frequencies": "*fp32"}
    constants = {"heads": heads, "kv_heads": kv_heads, "half": 64, "half_tile": 64, "inverse": False}
    constants |= {"heads_tile": _power_of_two(heads), "kv_heads_tile": _power_of_two(kv_heads)}
    kinds = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in pointers or "q_" in name or "k_" in name
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "__nv_sinf" in ptx
    assert "sin.approx" not in ptx
    assert "cos.approx" not in ptx
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx


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

# Of version 3 (hopper/flash_attn_interface.py); its first releases give the log-sum-exp as well.
FLASH_ATTN_3 = """
import flash_attn

def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    return flash_attn.flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal), None

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                           seqused_k=None, softmax_scale=None, causal=False):
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return flash_attn.flash_attn_varlen_func(q, k, v, *bounds, causal=causal), None
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules that are found before any installed ones, and forgets them afterwards."""

    tops = ("apex", "flash_attn", "flash_attn_interface", "normalization")

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
    package({"flash_attn.py": FLASH_ATTN, "flash_attn_interface.py": FLASH_ATTN_3})
    q, k, v = (torch.randn(2, 10, heads, 8) for heads in (4, 2, 2))
    segments = None if bounds is None else Segments.between(bounds)
    for function in (attention_flash, attention_flash_3):
        torch.testing.assert_close(function(q, k, v, segments), attention_torch(q, k, v, segments))


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

CPU_TASKS = [dispatch.task(CPU, dtype) for dtype in (torch.float32, torch.bfloat16)]
HOPPER = dispatch.Task(CUDA, torch.bfloat16, capability=(9, 0))
AMPERE = replace(HOPPER, capability=(8, 0))


@pytest.mark.parametrize("task", CPU_TASKS, ids=str)
@pytest.mark.parametrize("operation", dispatch.TABLE)
def test_the_cpu_takes_plain_torch_and_says_why(operation, task):
    choice = dispatch.choose(operation, task)
    assert choice.name == "torch"
    assert choice.function is dispatch.TABLE[operation]["torch"].function
    assert "it needs a CUDA device and this one is cpu" in choice.reason
    assert dispatch.choose(operation, task, "torch").function is choice.function


@pytest.mark.parametrize("operation", ["rope", "rms_norm", "add_rms_norm", "swiglu"])
def test_cuda_takes_triton_between_the_products(operation):
    pytest.importorskip("triton")
    assert dispatch.choose(operation, HOPPER).name == "triton"


def test_every_name_of_the_recipe_is_one_of_the_table():
    for operation, field in KernelsSection.model_fields.items():
        assert get_args(field.annotation) == ("auto", *dispatch.TABLE[operation])
    assert {*KernelsSection.model_fields, "add_rms_norm"} == set(dispatch.TABLE)


def test_a_sum_and_its_norm_take_the_backend_of_the_norm():
    choices = dispatch.choose_all(CPU_TASKS[0], {"rms_norm": "torch", "rope": "auto"})
    assert choices["rms_norm"].reason == choices["add_rms_norm"].reason == "asked for"
    assert choices["rope"].reason != "asked for"


def test_a_backend_that_cannot_serve_is_refused_with_the_mend():
    with pytest.raises(UnservableError, match="'triton' of rope cannot serve here: it needs a CUDA device") as error:
        dispatch.choose("rope", CPU_TASKS[0], "triton")
    assert "take one of auto, torch" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(UnservableError, match="rope has no backend 'cuda': take one of auto, triton, torch"):
        dispatch.choose("rope", CPU_TASKS[0], "cuda")


def order(task: dispatch.Task) -> list[str]:
    """What `auto` takes for attention, and what it takes where that one is missing, and so on."""
    table = dict(dispatch.TABLE["attention"])
    names = []
    while table:
        names.append(next(name for name, each in table.items() if not (each.refusal(task) or each.drawback(task))))
        del table[names[-1]]
        if names[-1] == "torch":
            return names
    return names


def test_attention_follows_device_mask_and_shape(package, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    package({"flash_attn.py": FLASH_ATTN, "flash_attn_interface.py": FLASH_ATTN})
    assert order(HOPPER) == ["flash_attn_3", "cudnn", "flash_attn", "triton", "sdpa_flash", "torch"]
    assert order(AMPERE) == ["flash_attn", "triton", "sdpa_flash", "torch"]
    assert order(replace(HOPPER, segments=True)) == ["flash_attn_3", "flash_attn", "triton", "torch"]
    assert order(replace(HOPPER, dtype=torch.float32)) == ["triton", "torch"]
    assert order(replace(HOPPER, head_dim=192)) == ["flash_attn_3", "flash_attn", "sdpa_flash", "torch"]
    assert order(replace(HOPPER, capability=(7, 5))) == ["torch"]
    # What would be slow can be asked for, what would be wrong cannot.
    assert dispatch.choose("attention", replace(AMPERE, segments=True), "cudnn").reason == "asked for"
    with pytest.raises(UnservableError, match="its head_dim is at most 128 and this is 192"):
        dispatch.choose("attention", replace(HOPPER, head_dim=192), "triton")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with pytest.raises(UnservableError, match="this torch has no cuDNN"):
        dispatch.choose("attention", HOPPER, "cudnn")


def test_the_reason_names_what_was_passed_over(package, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    package({"flash_attn.py": FLASH_ATTN})
    choice = dispatch.choose("attention", replace(AMPERE, segments=True))
    assert choice.function is attention_flash
    assert choice.reason == (
        "not flash_attn_3: it is made for Hopper (H100, H200); "
        "not cudnn: before Hopper torch's flash attention is faster"
    )
    choice = dispatch.choose("rms_norm", CPU_TASKS[0])
    assert choice.reason == "not triton, apex, liger: it needs a CUDA device and this one is cpu"


@pytest.mark.parametrize(("version", "serves"), [("2.0.9", False), ("1.0.9", False), ("2.1.0", True), ("2.10.0", True)])
def test_flash_attn_that_aligns_masks_to_the_first_key_is_refused(package, version, serves):
    package({"flash_attn.py": FLASH_ATTN.replace("2.8.3", version)})
    choice = dispatch.choose("attention", AMPERE)
    assert (choice.name == "flash_attn") == serves
    if not serves:
        assert f"not flash_attn: {version} is installed and, where there are fewer queries" in choice.reason
        assert choice.reason.endswith("(pip install 'flash-attn>=2.1')")
        with pytest.raises(
            UnservableError, match="its causal mask begins at the first key and not at the last"
        ) as error:
            dispatch.choose("attention", AMPERE, "flash_attn")
        assert "\n" not in str(error.value)


def test_flash_attn_that_does_not_load_is_passed_over_aloud(package):
    package({"flash_attn.py": "raise ImportError('flash_attn_2_cuda.so:\\n undefined symbol')"})
    choice = dispatch.choose("attention", AMPERE)
    assert choice.name != "flash_attn"
    assert "installed but does not import: flash_attn_2_cuda.so: undefined symbol" in choice.reason


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
    assert packages.nvidia_apex_available() is expected
    if "apex/normalization/__init__.py" not in files:
        assert "apex" not in sys.modules


if __name__ == "__main__":
    results: dict = {"imported": [name for name in ("triton", "flash_attn", "apex") if name in sys.modules]}
    for label, case in CASES.items():
        results[label] = {key: x.detach() for key, x in rotate_and_differentiate(rope_triton, case).items()}
    results["saved"] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: results["saved"].append(x) or x, lambda x: x):
        rope_triton(*CASES["fused"].inputs(), 1e6)
    torch.save(results, sys.argv[1])
