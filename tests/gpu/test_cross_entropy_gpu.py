"""Cross-entropy, alone and with the head, on a GPU: the cases that the interpreter computes, and a model's sizes."""

import pytest
import torch
from support import cross_entropy as support
from support.cross_entropy import CASES, LINEAR_CASES, Case, LinearCase

from megacode.kernels.cross_entropy import cross_entropy_triton
from megacode.kernels.linear_cross_entropy import linear_cross_entropy_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# The vocabulary of Code Llama, whole and by ranks, odd ones, and one of which a row is longer than 64 KB.
LARGE = [
    Case(1367, columns, dtype, ranks, expected=0.37)
    for columns, ranks in ((32016, 1), (32016, 2), (32016, 8), (32017, 1), (128256, 1))
    for dtype in (torch.bfloat16, torch.float32)
]
LARGE_LINEAR = [
    LinearCase(1500, 512, rows, chunk, dtype, ranks, factor=1 / 1024)
    for rows, ranks in ((32016, 1), (32017, 1), (8004, 2))
    for chunk in (None, 1024)
    for dtype in (torch.bfloat16, torch.float32)
]


@pytest.mark.parametrize("case", [*CASES.values(), *LARGE], ids=[*CASES, *map(str, LARGE)])
def test_kernels_are_as_exact_as_the_twin_and_give_the_same_bits_again(case):
    actual = support.compute(case, "triton", "cuda")
    support.check(case, actual, support.compute(case, "torch", "cuda"), support.compute(case, "exact", "cuda"), "cuda")
    for _ in range(3):
        assert all(map(torch.equal, actual, support.compute(case, "triton", "cuda")))


@pytest.mark.parametrize("case", [*LINEAR_CASES.values(), *LARGE_LINEAR], ids=[*LINEAR_CASES, *map(str, LARGE_LINEAR)])
def test_with_the_head_it_is_as_exact_as_the_two_one_after_the_other(case):
    actual, unfused, exact = (support.compute_linear(case, by, "cuda") for by in ("triton", "unfused", "exact"))
    support.check(case, actual, unfused, exact, "cuda")
    assert all(map(torch.equal, actual, support.compute_linear(case, "triton", "cuda")))


@pytest.mark.parametrize("by", ["torch", "triton"])
def test_what_was_given_away_is_not_read_again(by):
    assert all("modified by an inplace operation" in (error or "") for error in support.only_once(by, "cuda").values())


@pytest.mark.parametrize("by", ["torch", "triton"])
def test_ignored_rows_may_be_anything_and_unknown_labels_show(by):
    strange = support.strange(by, "cuda")
    assert strange["losses"][1] == 0
    assert (strange["ignored"][1] == 0).all()
    assert strange["unknown"].isinf().all()
    assert strange["unknown_2_ranks"].isinf().all()


def test_the_host_waits_for_nothing():
    x = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(129, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(129, (300,), device="cuda")
    expected = torch.full((), 1 / 300, device="cuda")

    def both() -> None:
        (cross_entropy_triton(x @ weight.t(), labels, expected=expected).sum() * expected).backward()
        linear_cross_entropy_triton(x, weight, labels, expected)[0].backward()

    both()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_the_head_with_its_loss_is_less_than_a_tenth_of_the_logits():
    tokens, hidden, rows = 8192, 256, 32016
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels, factors = torch.randint(rows, (tokens,), device="cuda"), torch.full((), 1 / tokens, device="cuda")
    linear_cross_entropy_triton(x, weight, labels, factors)  # the workspace of cuBLAS stays
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy_triton(x, weight, labels, factors)
    gradients = x.numel() * 2 + weight.numel() * 4
    assert torch.cuda.max_memory_allocated() - before - gradients < 0.1 * tokens * rows * 2


def test_rows_past_2_to_31_elements_are_reached():
    rows = 2**31 // 32016 + 3
    if torch.cuda.mem_get_info()[0] < 3 * rows * 32016 * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    logits = torch.zeros(rows, 32016, device="cuda", dtype=torch.bfloat16)
    logits[-3:] = torch.randn(3, 32016, device="cuda", dtype=torch.bfloat16)
    labels = torch.arange(rows, device="cuda") % 32016
    few = logits[-3:].clone().requires_grad_()
    logits.requires_grad_()
    losses, expected = cross_entropy_triton(logits, labels), cross_entropy_triton(few, labels[-3:])
    assert torch.equal(losses[-3:], expected)
    (gradient,), (wanted,) = (torch.autograd.grad(each.sum(), x) for each, x in ((losses, logits), (expected, few)))
    assert torch.equal(gradient[-3:], wanted)
