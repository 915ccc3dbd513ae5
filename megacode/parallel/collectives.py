"""The autograd pairs of tensor parallelism (Shoeybi et al. 2019, section 3: the functions f and g)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megacode.parallel.phases import measure


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        with measure("communication"):
            dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        with measure("communication"):
            dist.all_reduce(x, group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to_tensor_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """f: identity forward, all-reduce backward. Where a replicated tensor enters split computation."""
    return _Copy.apply(x, group)


def reduce_from_tensor_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """g: all-reduce forward, identity backward. Where partial sums become a replicated tensor."""
    return _Reduce.apply(x, group)
