"""The head and the cross-entropy in chunks of tokens, by the kernels in Triton's interpreter and in plain torch."""

import pytest
import torch
from support import cross_entropy as support
from support import triton_offline
from support.cross_entropy import LINEAR_CASES

from megacode.kernels.linear_cross_entropy import chunk_tokens, linear_cross_entropy_torch
from megacode.parallel.live import LiveBytes


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    pytest.importorskip("triton", reason="the interpreter is part of triton")
    path = tmp_path_factory.mktemp("triton") / "interpreted.pt"
    return triton_offline.interpret("support.cross_entropy", path, "linear")


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_kernels_are_as_exact_as_the_twin(interpreted, name):
    case = LINEAR_CASES[name]
    twin, exact = support.compute_linear(case, "torch"), support.compute_linear(case, "exact")
    support.check(case, interpreted[name], twin, exact)


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_the_twin_is_as_exact_as_the_two_one_after_the_other(name):
    case = LINEAR_CASES[name]
    unfused, exact = support.compute_linear(case, "unfused"), support.compute_linear(case, "exact")
    support.check(case, support.compute_linear(case, "torch"), unfused, exact)


@pytest.mark.parametrize("by", ["torch", "triton"])
def test_a_second_backward_is_refused(interpreted, by):
    errors = interpreted["once"] if by == "triton" else support.only_once("torch")
    assert "modified by an inplace operation" in errors["linear"]


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_the_gradients_that_are_wanted_are_made(frozen):
    x, weight = torch.randn(5, 4), torch.randn(7, 4)
    wanted = weight if frozen == "x" else x
    wanted.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.shape) or each, lambda each: each):
        total, _ = linear_cross_entropy_torch(x, weight, torch.arange(5), torch.ones(()))
    assert kept == [wanted.shape]
    (grad,) = torch.autograd.grad(total, wanted)
    logits = (x @ weight.t()).log_softmax(1)
    (expected,) = torch.autograd.grad(-logits.diagonal().sum(), wanted)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("tokens", [1, 128, 1347, 1348, 2048, 4096, 8192, 10000, 65536])
def test_chunks_suit_a_gpu_and_are_less_than_a_tenth(tokens):
    size = chunk_tokens(tokens)
    assert size % 128 == 0
    assert 0 < size < tokens / 10 or (size == 128 and tokens < 1348)
    assert size + 128 > 0.095 * tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 2048])
def test_less_than_a_tenth_of_the_logits_lives_besides_inputs_outputs_and_gradients(dtype, chunk):
    """With all tokens in one chunk more lives: what is counted is there."""
    tokens, hidden, rows = 2048, 16, 8000
    with LiveBytes() as live:
        x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
        weight = torch.randn(rows, hidden).to(dtype).requires_grad_()
        labels, factors = torch.randint(rows, (tokens,)), torch.full((tokens,), 1 / tokens)
        live.peak = before = live.count()
        total, losses = linear_cross_entropy_torch(x, weight, labels, factors, chunk=chunk)
        known = before + losses.numel() * 4 + x.numel() * x.element_size() + weight.numel() * 4
        logits = tokens * rows * x.element_size()
        extra = live.peak - known
        live.peak = live.count()
        total.backward()
    assert (extra < 0.1 * logits) == (chunk is None), extra / logits
    # In backward the weight's gradient is there once more, in the weight's dtype.
    rounded = weight.numel() * 2 if dtype == torch.bfloat16 else 0
    assert live.peak - known - rounded < 0.01 * logits
