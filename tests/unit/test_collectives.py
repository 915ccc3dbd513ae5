"""What tensor ranks exchange, without ranks: sums are taken in place."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megacode.parallel import collectives


@pytest.fixture(autouse=True)
def equal_ranks(monkeypatch):
    """The sum over two ranks that have the same."""

    def all_reduce(x, group, async_op):
        return SimpleNamespace(wait=lambda: x.mul_(2))

    monkeypatch.setattr(collectives, "dist", mock.Mock(all_reduce=all_reduce))


def test_the_gradient_of_an_input_becomes_its_own_sum():
    grad = torch.ones(2, 3)
    assert collectives.Replicated(None).spread(grad)() is grad
    assert torch.equal(grad, torch.full((2, 3), 2.0))


def test_partial_sums_become_the_sum_and_their_gradient_is_the_identity():
    weight = torch.ones(2, 3, requires_grad=True)
    partial = weight * 3
    total = collectives.sum_over_tensor_ranks(partial, None, split_sequence=False)
    assert total.data_ptr() == partial.data_ptr()
    assert torch.equal(total, torch.full((2, 3), 6.0))
    (grad,) = torch.autograd.grad((total * 5).sum(), weight)
    assert torch.equal(grad, torch.full((2, 3), 15.0))
