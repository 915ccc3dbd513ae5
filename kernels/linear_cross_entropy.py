"""A linear map to the vocabulary and the cross-entropy of its logits, which are never there as a whole.

Tokens go through in chunks: logits of a chunk (2 * h * V FLOPs a token, h hidden and V local rows), losses and gradient
over the logits (`cross_entropy`), then what the chunk gives to the gradients of x (2 * h * V) and of the weight
(2 * h * V): all of it in forward, so that logits need not be computed again. Backward is left to multiply both
gradients by one number. Bound by the products: of bf16, a token of a chunk of c moves besides what these and the loss
move 8 * h * V / c bytes, the weight's gradient read and written in fp32.

Memory besides inputs, outputs and gradients is the logits of a chunk and little more. The weight's gradient counts in
fp32, until backward rounds it to the weight's dtype.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacode.kernels.cross_entropy import TORCH, TRITON, Computation, Ranks


def linear_cross_entropy_torch(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    factors: Tensor,
    start: int = 0,
    ranks: Ranks | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of factor * loss, fp32 [], and the losses, fp32 [tokens], of logits x W^T, in plain torch: the twin.

    loss is the negative log-likelihood of a token's label. The sum alone can be differentiated, once, by x and weight;
    the losses have no gradient. For backward the two gradients are kept, and neither x nor the weight.

    On ranks that share the vocabulary the sum and the losses are the same. The gradient of x is that of this rank's
    rows alone: who gives all ranks the same x must sum it over them.

    Args:
        x: [tokens, hidden], bf16 or fp32.
        weight: [this rank's rows of the vocabulary, hidden], of the same dtype.
        labels: [tokens] int64, in the whole vocabulary, or IGNORE: loss and gradient 0.
        factors: of each token's loss, fp32 on x's device, one number or [tokens]; the same on all ranks. Not
            differentiated.
        start: this rank's first row in the whole vocabulary.
        ranks: who holds the other rows; None: nobody.
        chunk: tokens at a time; None: `chunk_tokens`.
    """
    return _apply(TORCH, x, weight, labels, factors, start, ranks, chunk)


def linear_cross_entropy_triton(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    factors: Tensor,
    start: int = 0,
    ranks: Ranks | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy_torch` with the kernels of `cross_entropy_triton` between torch's products."""
    return _apply(TRITON, x, weight, labels, factors, start, ranks, chunk)


def chunk_tokens(tokens: int) -> int:
    """Tokens in a chunk: the largest multiple of 128 of which logits are at most 9.5 % of all, and at least 128.

    Products on a GPU have tiles of 128 rows, and few of them leave processors idle. At 8,192 tokens of hidden size
    4,096 a chunk has 768: the product with the fewest tiles, that for x, has 192 of 128 x 128 for 132 processors.
    """
    return max(128, tokens * 95 // 1000 // 128 * 128)


def _apply(
    by: Computation,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    factors: Tensor,
    start: int,
    ranks: Ranks | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    assert x.dtype == weight.dtype, (x.dtype, weight.dtype)
    assert factors.dtype == torch.float32, factors.dtype
    assert factors.device == x.device, (factors.device, x.device)
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    size = chunk_tokens(x.shape[0]) if chunk is None else chunk
    factors = factors.detach().expand(labels.shape)
    return _LinearCrossEntropy.apply(x, weight, by, labels, factors, start, ranks, size, wanted)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        by: Computation,
        labels: Tensor,
        factors: Tensor,
        start: int,
        ranks: Ranks | None,
        size: int,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        tokens, rows = x.shape[0], weight.shape[0]
        grad_x = torch.empty_like(x) if wanted and ctx.needs_input_grad[0] else None
        total = torch.zeros_like(weight, dtype=torch.float32) if wanted and ctx.needs_input_grad[1] else None
        losses = x.new_empty(tokens, dtype=torch.float32)
        memory = x.new_empty(min(size, tokens), rows)
        for first in range(0, tokens, size):
            part = slice(first, min(first + size, tokens))
            logits = torch.mm(x[part], weight.t(), out=memory[: part.stop - first])
            losses[part] = by.losses(logits, labels[part], start, ranks, factors[part] if wanted else None)
            if grad_x is not None:
                torch.mm(logits, weight, out=grad_x[part])
            if total is not None:
                _accumulate(total, logits, x[part])
        ctx.save_for_backward(grad_x, total)
        ctx.by, ctx.dtype = by, weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * factors).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, total = ctx.saved_tensors
        grads: list[Tensor | None] = []
        for each in (grad_x, total):
            if each is not None:
                torch.autograd.graph.increment_version(each)  # it is given away: a second backward finds it changed
                factors = grad.expand(each.shape[0])
                ctx.by.rescale(each, factors, torch.ones_like(grad).expand_as(factors))
            grads.append(None if each is None else each.to(ctx.dtype))
        return *grads, None, None, None, None, None, None, None


def _accumulate(total: Tensor, slopes: Tensor, x: Tensor) -> None:
    """Adds slopes^T x to total [rows, hidden], fp32, for slopes [tokens, rows] and x [tokens, hidden]."""
    if x.dtype == torch.float32:
        total.addmm_(slopes.t(), x)
    elif x.device.type == "cuda":
        # One product that adds in fp32, where the product by itself would be written, read and added.
        torch.addmm(total, slopes.t(), x, out_dtype=torch.float32, out=total)
    else:
        wide = x.float()  # torch has no such product on a CPU
        size = max(1, 2**18 // x.shape[0])
        for first in range(0, total.shape[0], size):
            rows = slice(first, first + size)
            total[rows].addmm_(slopes[:, rows].float().t(), wide)
