"""How the plain-torch twins of kernels that are bound by memory walk over the rows of tensors."""

from collections.abc import Iterator

import torch
from torch import Tensor

CACHED_ELEMENTS = 2**18
"""1 MiB of fp32 numbers: what an operation's temporaries keep in a core's cache, and in pages that were used before.

With temporaries as large as the tensors, a norm of 2,048 rows of 4,096 takes a CPU twice as long in fp32 and 7 times as
long in bf16 (docs/benchmarks.md): each passes through memory, in pages that are new to the process.
"""


BUSY_ELEMENTS = 2**24
"""64 MiB of them: enough to keep a GPU busy, and little of its memory."""


def row_parts(*tensors: Tensor, dim: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Views of some rows after the other of tensors with as many along `dim`; the first one says how many at a time."""
    first = tensors[0]
    elements = CACHED_ELEMENTS if first.device.type == "cpu" else BUSY_ELEMENTS
    rows = max(1, elements // max(1, first.narrow(dim, 0, min(1, first.shape[dim])).numel()))
    return zip(*(x.split(rows, dim) for x in tensors), strict=True)


def flat(x: Tensor) -> Tensor:
    """x [..., width] as [rows, width]: a view where one stride leads from row to row, else a copy."""
    return x.reshape(-1, x.shape[-1])


def empty_like(x: Tensor) -> Tensor:
    """Without values, contiguous whatever the strides of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """What statistics of numbers of a dtype are computed in."""
    return torch.promote_types(dtype, torch.float32)
