"""Cross-entropy over a whole or split vocabulary: the kernels in Triton's interpreter and through its compiler."""

import re

import pytest
import torch
import torch.nn.functional as F
from support import cross_entropy as support
from support import kernels, triton_offline
from support.cross_entropy import CASES

from megacode.kernels import cross_entropy as module
from megacode.kernels.cross_entropy import IGNORE, cross_entropy_torch
from megacode.model import layers


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    pytest.importorskip("triton", reason="the interpreter is part of triton")
    path = tmp_path_factory.mktemp("triton") / "interpreted.pt"
    return triton_offline.interpret("support.cross_entropy", path, "alone")


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_exact_as_the_twin(interpreted, name):
    case = CASES[name]
    support.check(case, interpreted[name], support.compute(case, "torch"), support.compute(case, "exact"))


@pytest.mark.parametrize("name", CASES)
def test_the_twin_is_as_exact_as_torchs_function(name):
    case = CASES[name]
    logits, labels, gradient = case.inputs()
    logits.requires_grad_()
    losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    torchs = [losses.detach(), *torch.autograd.grad(losses, logits, gradient)]
    twin = support.compute(case, "torch")
    support.check(case, twin, torchs, support.compute(case, "exact"))


def test_the_same_bits_come_again(interpreted):
    assert all(map(torch.equal, interpreted["again"], interpreted["1003-bf16"]))


def test_the_label_without_loss_is_that_of_the_model():
    assert IGNORE == layers.IGNORE


def test_nothing_imports_triton_before_it_is_used(interpreted):
    assert interpreted["imported"] == []


@pytest.mark.parametrize("by", ["torch", "triton"])
def test_what_was_given_away_is_not_read_again(interpreted, by):
    errors = interpreted["once"] if by == "triton" else support.only_once("torch")
    assert all("modified by an inplace operation" in (errors[name] or "") for name in ("twice", "kept")), errors


@pytest.mark.parametrize("by", ["torch", "triton"])
def test_ignored_rows_may_be_anything_and_unknown_labels_show(interpreted, by):
    strange = interpreted["strange"] if by == "triton" else support.strange("torch")
    assert strange["losses"][1] == 0
    assert (strange["ignored"][1] == 0).all()
    assert strange["ignored"].isfinite().all()
    for name in ("unknown", "unknown_2_ranks"):
        assert (strange[name] == torch.inf).all()


def test_a_row_whose_factor_was_expected_is_left_alone(interpreted):
    """inf / inf would make it NaN."""
    rows, factors, expected = torch.tensor([[1.0, 2.0]]), torch.tensor([torch.inf]), torch.tensor([torch.inf])
    module.TORCH.rescale(rows, factors, expected)
    assert rows.tolist() == [[1.0, 2.0]]
    assert interpreted["rescaled"].tolist() == [[1.0, 2.0], [4.5, 6.0]]


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 5, requires_grad=True)
    losses = cross_entropy_torch(x * 2, torch.tensor([0, 1, 2]))
    (grad,) = torch.autograd.grad(losses.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


RESIDENT = {"whole": 3, "evaluation": 3, "part": 3, "gradient": 3, "rescale": 2}
"""Programs of 16 warps that a processor must hold at a time."""


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("which", RESIDENT)
def test_kernels_compile_for_hopper_and_as_many_fit_as_their_comment_says(which, dtype, tmp_path, monkeypatch):
    """The real compiler: types, 16-byte accesses, no spilled registers, and nothing whose order could vary."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = module._kernels()
    kernel = {"gradient": compiled.gradient, "rescale": compiled.rescale}.get(which, compiled.forward)
    absent = {"whole": {"tops", "totals"}, "evaluation": {"tops", "totals", "factors"}, "part": {"losses", "factors"}}
    names = ("losses", "tops", "totals", "factors", "expected")
    types = {"labels": "*i64", "logits": f"*{dtype}", "slopes": f"*{dtype}"} | dict.fromkeys(names, "*fp32")
    types = {key: word for key, word in types.items() if key in kernel.arg_names and key not in absent.get(which, ())}
    row = torch.empty(1, 32016, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    layout = module._layout(row)
    constants = {**layout, **dict.fromkeys(absent.get(which, ()))}
    warps = constants.pop("num_warps")
    ptx, registers, stack = kernels.resources(kernel, types, constants, warps, tmp_path)
    assert re.search(r"ld\.global\S*\.v4", ptx)
    assert re.search(r"st\.global\S*\.v4", ptx) or which in ("evaluation", "part")
    assert not re.search(r"\b(atom|red)\.", ptx)
    assert stack == 0
    assert -(-registers // 8) * 8 * 32 * warps * (RESIDENT[which] * 16 // warps) <= 65536


@pytest.mark.parametrize(("stride", "columns"), [(4008, 4002), (4002, 4002)])
def test_rows_of_any_number_of_columns_are_read_in_wide_loads(stride, columns, tmp_path, monkeypatch):
    """The padded rows of a rank, 16 bytes at a time; rows that begin at multiples of 4 bytes, 4 at a time."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    layout = module._layout(torch.empty(2, stride, dtype=torch.bfloat16)[:, :columns])
    warps = layout.pop("num_warps")
    types = {"labels": "*i64", "logits": "*bf16", "tops": "*fp32", "totals": "*fp32"}
    monkeypatch.setattr(triton_offline, "ALIGNED", ())
    constants = {**layout, "losses": None, "factors": None}
    ptx, _, _ = kernels.resources(module._kernels().forward, types, constants, warps, tmp_path)
    assert bool(re.search(r"ld\.global\S*\.v4", ptx)) == (stride == 4008)
