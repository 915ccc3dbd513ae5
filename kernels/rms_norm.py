"""RMSNorm (Zhang and Sennrich 2019) of hidden states, alone or together with the residual sum before it.

normed = weight * x / sqrt(mean(x^2) + epsilon), the mean over the hidden dimension.

Costs a token of h = hidden bf16 elements, besides 4 bytes for the root: forward reads x and writes the result, 4 * h
bytes; backward reads the gradient and x and writes x's, 6 * h. With the residual sum forward is 8 * h (two read, two
written) and backward 8 * h (two gradients and the sum read, one gradient written). About 4 * h and 10 * h FLOPs: bound
by memory. What is kept for backward is x (or the sum), weight and the root.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacode.kernels.rows import at_least_fp32, empty_like, flat, row_parts


def rms_norm_torch(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of x [..., hidden] under weight [hidden], in plain torch: the twin, and transformers' LlamaRMSNorm.

    Statistics are fp32. In bf16 it rounds twice, as transformers does: x over its root, and the weight's product. The
    gradients cannot be differentiated again.
    """
    return _TorchNorm.apply(x, weight, epsilon)


def add_rms_norm_torch(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + residual, each [..., hidden], and the RMSNorm of that sum as its dtype holds it."""
    total = x + residual
    return total, rms_norm_torch(total, weight, epsilon)


class _TorchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        normed = empty_like(x)
        root = torch.empty(x.shape[:-1], dtype=at_least_fp32(x.dtype), device=x.device).flatten()
        for part, out, inverse in row_parts(flat(x), flat(normed), root):
            wide = part.to(root.dtype)
            inverse.copy_(torch.rsqrt(wide.square().mean(-1) + epsilon))
            torch.mul(weight, (wide * inverse[:, None]).to(x.dtype), out=out)
        ctx.save_for_backward(x, weight, root)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, root = ctx.saved_tensors
        grad_x, grad_weight = empty_like(x), torch.zeros(weight.shape, dtype=root.dtype, device=x.device)
        for slope, part, inverse, out in row_parts(flat(grad), flat(x), root, flat(grad_x)):
            normal, slope = part.to(root.dtype) * inverse[:, None], slope.to(root.dtype)
            grad_weight += (slope * normal).sum(0)
            slope = slope * weight
            pull = (slope * normal).mean(-1, keepdim=True)
            out.copy_(slope.sub_(normal.mul_(pull)).mul_(inverse[:, None]))
        return grad_x, grad_weight.to(weight.dtype), None


def rms_norm_triton(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm_torch` as one Triton kernel, and two for backward. Rounds once, at the end; the result is contiguous.

    x [..., hidden] and weight [hidden] have one dtype, bf16 or fp32; hidden is at most 16,384. Rows may be strided;
    where no single stride leads from row to row, or the last stride is not 1, a copy is read. Gradients are the same
    bits in every run on the same kind of GPU. They cannot be differentiated again.
    """
    return _Norm.apply(x, weight, epsilon)


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_torch` as one Triton kernel, and two for backward; otherwise as `rms_norm_triton`."""
    return _AddNorm.apply(x, residual, weight, epsilon)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        _, normed, root = _forward(x, None, weight, epsilon)
        ctx.save_for_backward(x, weight, root)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_backward(grad, None, *ctx.saved_tensors), None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        total, normed, root = _forward(x, residual, weight, epsilon)
        ctx.save_for_backward(total, weight, root)
        ctx.set_materialize_grads(False)  # the last norm's sum has no other reader: zeros would be written and read
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if grad is None:
            return grad_total, grad_total, None, None
        grad_x, grad_weight = _backward(grad, grad_total, *ctx.saved_tensors)
        return grad_x, grad_x, grad_weight, None


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (x itself without a residual), the norm, and one over each row's root: fp32 [rows]."""
    hidden = _checked_hidden(x, weight)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    flat, other = _rows(x), None if residual is None else _rows(residual)
    assert other is None or (other.shape == flat.shape and other.dtype == flat.dtype), (x.shape, x.dtype)
    root = torch.empty(flat.shape[0], dtype=torch.float32, device=x.device)
    if flat.shape[0] > 0:
        tile, warps, programs = _layout(hidden, _FORWARD_WARPS, flat)
        _forward_kernel()[(programs,)](
            *(flat, other, weight, None if other is None else total, normed, root, flat.shape[0]),
            *(flat.stride(0), 0 if other is None else other.stride(0), epsilon),
            hidden=hidden,
            tile=tile,
            num_warps=warps,
        )
    return total, normed, root


def _backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, root: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight; `grad_total`, what else flows into x, is added to the former."""
    hidden = _checked_hidden(x, weight)
    grad_x, grad_weight = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight)
    flat, other = _rows(grad), None if grad_total is None else _rows(grad_total)
    if flat.shape[0] == 0:
        return grad_x, grad_weight.zero_()
    x = _rows(x)
    tile, warps, programs = _layout(hidden, _BACKWARD_WARPS, flat)
    partials = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    _backward_kernel()[(programs,)](
        *(flat, other, x, weight, root, grad_x, partials, flat.shape[0]),
        *(flat.stride(0), 0 if other is None else other.stride(0), x.stride(0)),
        hidden=hidden,
        tile=tile,
        num_warps=warps,
    )
    _sum_kernel()[(-(-hidden // 32),)](partials, grad_weight, programs, hidden, rows_tile=128, columns_tile=32)
    return grad_x, grad_weight


def _checked_hidden(x: Tensor, weight: Tensor) -> int:
    hidden = x.shape[-1]
    assert weight.shape == (hidden,), (x.shape, weight.shape)
    assert weight.is_contiguous(), weight.stride()
    assert weight.dtype == x.dtype, (x.dtype, weight.dtype)
    assert 0 < hidden <= 16384, hidden
    return hidden


def _rows(x: Tensor) -> Tensor:
    """x as [rows, hidden]: a view where one stride leads from row to row and the last stride is 1, else a copy."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


_FORWARD_WARPS, _BACKWARD_WARPS = 32, 16
"""Warps that a processor runs at a time; a program loops over rows, so that there need be no more programs than that.

A thread holds 32 bytes of a row, two 16-byte loads, and has as many of the next row in flight while it computes. A load
takes about 0.8 us under load, in which each of an H200's 132 processors must have 4.3 TB/s * 0.8 us / 132 = 26 KB on
their way, reads and writes together. Forward takes up to 64 registers a thread, so 32 warps fit: 32 KB of reads in
flight, 64 KB with a residual. Backward also keeps the weight's gradient and takes up to 128: 16 warps, 32 KB of reads.
Their arithmetic, about 14 instructions an element, takes a third of the time that their bytes take.
"""


def _layout(hidden: int, resident_warps: int, rows: Tensor) -> tuple[int, int, int]:
    """(columns of a tile, warps of a program, programs) for a kernel of which `resident_warps` run on a processor."""
    tile = 1 << (hidden - 1).bit_length()
    warps = min(32, max(1, tile * rows.element_size() // (32 * 32)))
    cuda = rows.device.type == "cuda"  # or else it is Triton's interpreter, which runs one program at a time
    processors = torch.cuda.get_device_properties(rows.device).multi_processor_count if cuda else 1
    return tile, warps, min(rows.shape[0], processors * max(1, resident_warps // warps))


@functools.cache
def _forward_kernel() -> Any:
    """Compiled for a hidden size and dtype at the first launch with them, like the other kernels."""
    import triton
    import triton.language as tl

    def forward(
        x: tl.tensor,
        residual: tl.tensor | None,
        weight: tl.tensor,
        total: tl.tensor | None,
        normed: tl.tensor,
        root: tl.tensor,
        rows: tl.tensor,
        x_stride: tl.tensor,
        residual_stride: tl.tensor,
        epsilon: tl.tensor,
        hidden: tl.constexpr,
        tile: tl.constexpr,
    ) -> None:
        """Program p takes rows p, p + programs, ...: a row lies in registers, and the next one is on its way."""
        first = tl.program_id(0).to(tl.int64)  # 64 bits: a batch of long contexts holds more than 2^31 elements
        step = tl.num_programs(0)
        column = tl.arange(0, tile)
        inside = column < hidden
        scale = tl.load(weight + column, mask=inside, other=0.0)
        next_x = tl.load(x + first * x_stride + column, mask=inside, other=0.0)
        if residual is not None:
            next_residual = tl.load(residual + first * residual_stride + column, mask=inside, other=0.0)
        for index in range(tl.cdiv(rows - tl.program_id(0), step)):
            row = first + index * step
            value = next_x
            ahead = inside & (row + step < rows)
            next_x = tl.load(x + (row + step) * x_stride + column, mask=ahead, other=0.0)
            if residual is not None:
                # The norm is that of the sum as it is kept, since that is what backward reads.
                value = (value.to(tl.float32) + next_residual.to(tl.float32)).to(x.dtype.element_ty)
                next_residual = tl.load(residual + (row + step) * residual_stride + column, mask=ahead, other=0.0)
                tl.store(total + row * hidden + column, value, mask=inside)
            wide = value.to(tl.float32)
            inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / hidden + epsilon)
            tl.store(root + row, inverse)
            tl.store(normed + row * hidden + column, wide * inverse * scale.to(tl.float32), mask=inside)

    return triton.jit(forward)


@functools.cache
def _backward_kernel() -> Any:
    import triton
    import triton.language as tl

    def backward(
        grad: tl.tensor,
        grad_total: tl.tensor | None,
        x: tl.tensor,
        weight: tl.tensor,
        root: tl.tensor,
        grad_x: tl.tensor,
        partials: tl.tensor,
        rows: tl.tensor,
        grad_stride: tl.tensor,
        grad_total_stride: tl.tensor,
        x_stride: tl.tensor,
        hidden: tl.constexpr,
        tile: tl.constexpr,
    ) -> None:
        """Rows as in forward. Program p sums its rows' part of the weight's gradient into partials[p]."""
        first = tl.program_id(0).to(tl.int64)
        step = tl.num_programs(0)
        column = tl.arange(0, tile)
        inside = column < hidden
        scale = tl.load(weight + column, mask=inside, other=0.0)
        grad_weight = tl.zeros([tile], tl.float32)
        next_grad = tl.load(grad + first * grad_stride + column, mask=inside, other=0.0)
        next_x = tl.load(x + first * x_stride + column, mask=inside, other=0.0)
        next_root = tl.load(root + first)
        if grad_total is not None:
            next_total = tl.load(grad_total + first * grad_total_stride + column, mask=inside, other=0.0)
        for index in range(tl.cdiv(rows - tl.program_id(0), step)):
            row = first + index * step
            slope, value, inverse = next_grad.to(tl.float32), next_x.to(tl.float32), next_root
            more = row + step < rows
            next_grad = tl.load(grad + (row + step) * grad_stride + column, mask=inside & more, other=0.0)
            next_x = tl.load(x + (row + step) * x_stride + column, mask=inside & more, other=0.0)
            next_root = tl.load(root + row + step, mask=more, other=0.0)
            grad_weight += slope * (value * inverse)
            slope = slope * scale.to(tl.float32)
            pull = tl.sum(slope * value, axis=0) * inverse * inverse / hidden
            result = (slope - value * pull) * inverse
            if grad_total is not None:
                result += next_total.to(tl.float32)
                place = grad_total + (row + step) * grad_total_stride + column
                next_total = tl.load(place, mask=inside & more, other=0.0)
            tl.store(grad_x + row * hidden + column, result, mask=inside)
        tl.store(partials + first * hidden + column, grad_weight, mask=inside)

    return triton.jit(backward)


@functools.cache
def _sum_kernel() -> Any:
    import triton
    import triton.language as tl

    def sum_columns(
        partials: tl.tensor,
        out: tl.tensor,
        rows: tl.tensor,
        columns: tl.tensor,
        rows_tile: tl.constexpr,
        columns_tile: tl.constexpr,
    ) -> None:
        """Sums partials [rows, columns] over the rows, always in the same order."""
        column = tl.program_id(0) * columns_tile + tl.arange(0, columns_tile)
        inside = column < columns
        total = tl.zeros([rows_tile, columns_tile], tl.float32)
        for start in range(0, rows, rows_tile):
            row = start + tl.arange(0, rows_tile)
            place = partials + row[:, None] * columns + column[None, :]
            total += tl.load(place, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        tl.store(out + column, tl.sum(total, axis=0), mask=inside)

    return triton.jit(sum_columns)
