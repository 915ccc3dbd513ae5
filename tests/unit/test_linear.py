"""Linear maps as one autograd node: the same gradients as torch's own, and nothing kept that can be made again."""

from functools import partial

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from megacode.kernels.rms_norm import rms_norm_torch
from megacode.kernels.swiglu import swiglu_torch as swiglu
from megacode.model.linear import linears


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs)
    return torch.autograd.grad(loss, inputs)


def test_maps_of_a_norm_and_of_swiglu():
    x, norm, one, two = tensors((2, 5, 8), (8,), (6, 8), (3, 8))
    again = partial(rms_norm_torch, epsilon=1e-5)
    expected = [F.linear(again(x, norm), weight) for weight in (one, two)]
    actual = linears((one, two), x, norm, first=again)
    torch.testing.assert_close(actual, tuple(expected))
    inputs = (x, norm, one, two)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs))
    gate, up, down = tensors((2, 5, 8), (2, 5, 8), (4, 8))
    inputs = (gate, up, down)
    actual, expected = linears((down,), gate, up, first=swiglu), [F.linear(swiglu(gate, up), down)]
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs))


def test_an_input_without_gradient():
    x, weight = tensors((2, 5, 8), (3, 8))
    (found,) = gradients(linears((weight,), x.detach()), (weight,))
    torch.testing.assert_close(found, gradients([F.linear(x, weight)], (weight,))[0])


def test_backward_keeps_the_inputs_and_the_parameters_themselves():
    gate, up, down = tensors((2, 5, 8), (2, 5, 8), (4, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linears((down,), gate, up, first=swiglu)
    assert [id(tensor) for tensor in kept] == [id(gate), id(up), id(down)]


def test_a_parameter_may_be_released_and_gathered_between_forward_and_backward():
    """As ZeRO-3 does: its data is swapped, and the gathered storage must not be held by anyone."""
    x, _ = tensors((2, 5, 8), (1,))
    weight = torch.nn.Parameter(torch.randn(3, 8, dtype=torch.float64))
    values = weight.detach().clone()
    storage = StorageWeakRef(weight.untyped_storage())
    expected = gradients([F.linear(x, values.requires_grad_())], (x, values))
    outputs = linears((weight,), x)
    weight.data = torch.empty(0, dtype=torch.float64)
    assert storage.expired()
    weight.data = values.detach().clone()
    torch.testing.assert_close(gradients(outputs, (x, weight)), expected)
