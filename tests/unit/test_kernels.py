"""Attention and the choice of backends, on the CPU."""

import inspect
import itertools
import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.training import recipe
from torch import Tensor

from megacode.errors import UserError
from megacode.kernels import dispatch, packages
from megacode.kernels.attention import Segments, attention_torch
from megacode.kernels.dispatch import UnservableError
from megacode.kernels.packages import attention_flash, attention_flash_3
from megacode.parallel.build import choose_kernels, with_served_kernels
from megacode.recipe import KernelsSection

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


@settings(max_examples=40)
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

    tops = ("apex", "flash_attn", "flash_attn_interface", "liger_kernel", "normalization")

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
    assert order(HOPPER) == ["flash_attn_3", "cudnn", "flash_attn", "triton", "torch"]
    assert (
        order(AMPERE) == order(replace(HOPPER, capability=(10, 0))) == ["flash_attn", "sdpa_flash", "triton", "torch"]
    )
    assert order(replace(HOPPER, segments=True)) == ["flash_attn_3", "flash_attn", "triton", "torch"]
    assert order(replace(HOPPER, head_dim=320)) == ["torch"]
    assert order(replace(HOPPER, dtype=torch.float32)) == ["triton", "torch"]
    assert order(replace(HOPPER, head_dim=192)) == ["flash_attn_3", "flash_attn", "sdpa_flash", "torch"]
    assert order(replace(HOPPER, capability=(7, 5))) == ["torch"]
    # What would be slow can be asked for, what can't serve cannot.
    assert dispatch.choose("attention", AMPERE, "cudnn").reason == "asked for"
    with pytest.raises(UnservableError, match="it has no call for packed documents"):
        dispatch.choose("attention", replace(HOPPER, segments=True), "cudnn")
    with pytest.raises(UnservableError, match="its head_dim is at most 128 and this is 192"):
        dispatch.choose("attention", replace(HOPPER, head_dim=192), "triton")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with pytest.raises(UnservableError, match="this torch has no cuDNN"):
        dispatch.choose("attention", HOPPER, "cudnn")


def test_the_reason_names_what_was_passed_over(package, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    package({"flash_attn.py": FLASH_ATTN})
    choice = dispatch.choose("attention", AMPERE)
    assert choice.function is attention_flash
    assert choice.reason == (
        "not flash_attn_3: it is made for Hopper (H100, H200); "
        "not cudnn: torch's flash attention is faster on all but Hopper"
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


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"flash_attn/cute/__init__.py": ""}, "the installed one has no flash_attn.flash_attn_func"),  # version 4
        ({"flash_attn.py": "raise RuntimeError('operator is registered twice')"}, "registered twice"),
    ],
    ids=["4", "broken"],
)
def test_flash_attn_that_is_another_or_broken_is_passed_over(package, files, words):
    package(files)
    assert words in dispatch.choose("attention", AMPERE).reason


def test_an_old_liger_and_an_apex_without_its_extension_are_refused(package):
    pytest.importorskip("triton")
    package(
        {
            "liger_kernel/__init__.py": "",
            "liger_kernel/ops/__init__.py": "",
            "apex/__init__.py": "",
            "apex/normalization/__init__.py": RMS_NORM,
        }
    )
    with pytest.raises(UnservableError, match=r"has no liger_kernel.ops.LigerRMSNormFunction .*'liger-kernel>=0.8'"):
        dispatch.choose("rms_norm", AMPERE, "liger")
    with pytest.raises(UnservableError, match="'apex' of rms_norm cannot serve here: it is not installed"):
        dispatch.choose("rms_norm", AMPERE, "apex")


def test_the_real_liger_has_what_is_called():
    """Its functions' parameters, by the names and places that are given; its kernels need a GPU."""
    ops = pytest.importorskip("liger_kernel.ops")
    norm = list(inspect.signature(ops.LigerRMSNormFunction.forward).parameters)
    assert norm[1:7] == ["X", "W", "eps", "offset", "casting_mode", "in_place"]
    assert list(inspect.signature(ops.LigerSiLUMulFunction.forward).parameters)[1:3] == ["a", "b"]


def test_a_recipe_decides_who_computes():
    config = recipe(kernels={"rope": "torch"})
    choices = choose_kernels(config, CPU, torch.float32)
    assert (choices["rope"].reason, choices["swiglu"].reason) != ("asked for", "asked for")
    assert choices["rope"].reason == "asked for"
    forced = recipe(kernels={"attention": "triton", "swiglu": "torch"})
    with pytest.raises(UserError, match="kernels: backend 'triton' of attention cannot serve here: it needs a CUDA"):
        choose_kernels(forced, CPU, torch.float32)
    served, refused = with_served_kernels(forced, CPU, torch.float32)
    assert list(refused) == ["attention"]
    assert (served.kernels.attention, served.kernels.swiglu) == ("auto", "torch")


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
