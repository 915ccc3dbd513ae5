"""Linear maps of one input as one autograd node, which decides what is kept for backward."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

Wait = Callable[[], Tensor]
"""Waits for an exchange that was started and returns its result."""


class Exchange(Protocol):
    """What ranks that share linear maps by their outputs exchange around them."""

    def collect(self, x: Tensor) -> Wait:
        """Start to make the maps' whole input from this rank's."""
        ...

    def spread(self, grad: Tensor) -> Wait:
        """Start to sum over ranks the gradient of the maps' whole input, and keep that of this rank's input.

        `grad` is given away: contiguous, and nobody reads it afterwards.
        """
        ...


class _Alone:
    """One process: nothing to exchange."""

    def collect(self, x: Tensor) -> Wait:
        return lambda: x

    def spread(self, grad: Tensor) -> Wait:
        return lambda: grad


ALONE: Exchange = _Alone()


def linears(
    weights: Sequence[Tensor],
    *inputs: Tensor,
    first: Callable[..., Tensor] | None = None,
    exchange: Exchange = ALONE,
) -> tuple[Tensor, ...]:
    """x W^T for each W of `weights`, where x = exchange.collect(first(*inputs)).

    For backward the node keeps `inputs` and the weights, no more: what `first` makes of the inputs and what was
    collected of other ranks are made again. The weights are kept as the parameters that they are, not as views of their
    storage (as F.linear's node would), so that ZeRO-3 can release them in between.

    In backward, collecting goes on while the input's gradient is computed, and spreading that while the weights'
    gradients are (Korthikanti et al. 2022, section 4.2.2).

    Args:
        weights: [out, in] each.
        inputs: of `first`; without it one, [..., in] (or what `exchange` makes this of).
        first: something cheap to compute twice, without randomness.
        exchange: with whom the maps' outputs are shared.
    """
    outputs = _Linears.apply(first, exchange, len(inputs), *inputs, *weights)
    return outputs if isinstance(outputs, tuple) else (outputs,)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first: Callable[..., Tensor] | None, exchange: Exchange, num_inputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.first, ctx.exchange, ctx.num_inputs = first, exchange, num_inputs
        ctx.save_for_backward(*tensors)
        inputs, weights = tensors[:num_inputs], tensors[num_inputs:]
        x = exchange.collect(first(*inputs) if first else inputs[0])()
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, first, exchange = ctx.saved_tensors, ctx.first, ctx.exchange
        needed = ctx.needs_input_grad[3:]
        inputs, weights = tensors[: ctx.num_inputs], tensors[ctx.num_inputs :]
        with torch.enable_grad():
            own = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=False)]
            made = first(*own) if first else own[0]
        again = get_gradient_edge(made) if first and made.requires_grad else None
        collected, wanted = exchange.collect(made.detach()), made.requires_grad
        # Everything of the whole sequence is let go of as soon as it has served, before the norm's backward above all.
        del made
        spread = exchange.spread(_input_grad(grads, weights)) if wanted else None
        x = collected().flatten(0, -2)
        del collected
        weight_grads = [grad.flatten(0, -2).t() @ x for grad in grads]
        del x
        if spread is None:
            return None, None, None, *(None for _ in own), *weight_grads
        input_grads: list[Tensor | None] = [spread()]
        del spread
        if again:
            found = iter(torch.autograd.grad(again, [x for x in own if x.requires_grad], input_grads[0]))
            input_grads = [next(found) if x.requires_grad else None for x in own]
        return None, None, None, *input_grads, *weight_grads


def _input_grad(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Sum of grad W over the maps, each added within its product."""
    total = grads[0].flatten(0, -2) @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total.addmm_(grad.flatten(0, -2), weight)
    return total.unflatten(0, grads[0].shape[:-1])
