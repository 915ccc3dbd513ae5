"""SwiGLU (Shazeer 2020): silu(gate) * up, where silu(g) = g * sigmoid(g).

Costs a token of f = ffn bf16 elements: forward reads gate and up and writes the product, 6 * f bytes; backward reads
the gradient, gate and up and writes both their gradients, 10 * f. About 5 * f and 12 * f FLOPs: bound by memory. What
is kept for backward is gate and up, or the tensor that holds both.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacode.kernels.rows import empty_like, flat, row_parts


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, each [..., ffn], in plain torch: the twin, and what transformers computes.

    In bf16 it rounds twice: silu(gate), and the product. The gradients cannot be differentiated again.
    """
    return _TorchSwiGlu.apply(gate, up)


def swiglu_packed_torch(packed: Tensor) -> Tensor:
    """`swiglu_torch` of the halves of packed [..., 2 * ffn], gate first: [..., ffn]."""
    return swiglu_torch(*packed.chunk(2, dim=-1))


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu_torch` as one Triton kernel, and one for backward. Rounds once, at the end; the result is contiguous.

    gate and up [..., ffn] have one dtype, bf16 or fp32. Rows may be strided; where no single stride leads from row to
    row, or the last stride is not 1, a copy is read. The gradients cannot be differentiated again.
    """
    return _SwiGlu.apply(gate, up)


def swiglu_packed_triton(packed: Tensor) -> Tensor:
    """`swiglu_packed_torch` by the kernels of `swiglu_triton`: backward writes both halves of one gradient in place."""
    return _PackedSwiGlu.apply(packed)


class _TorchSwiGlu(torch.autograd.Function):
    """Keeps gate and up, where operations of plain torch would keep silu(gate) as well."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        product = empty_like(gate)
        for gates, ups, out in row_parts(flat(gate), flat(up), flat(product)):
            torch.mul(F.silu(gates), ups, out=out)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = empty_like(gate), empty_like(up)
        for slope, *parts in row_parts(*map(flat, (grad, gate, up, grad_gate, grad_up))):
            gates, ups, gates_out, ups_out = parts
            torch.mul(F.silu(gates), slope, out=ups_out)
            torch.ops.aten.silu_backward.grad_input(slope * ups, gates, grad_input=gates_out)
        return grad_gate, grad_up


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        _backward(grad, gate, up, grad_gate, grad_up)
        return grad_gate, grad_up


class _PackedSwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        assert packed.shape[-1] % 2 == 0, packed.shape
        ctx.save_for_backward(packed)
        return _forward(*packed.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (packed,) = ctx.saved_tensors
        grad_packed = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
        _backward(grad, *packed.chunk(2, dim=-1), *grad_packed.chunk(2, dim=-1))
        return grad_packed


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    assert gate.shape == up.shape, (gate.shape, up.shape)
    assert gate.dtype == up.dtype, (gate.dtype, up.dtype)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(_forward_kernel, _rows(gate), _rows(up), out.view(-1, out.shape[-1]))
    return out


def _backward(grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor) -> None:
    """Writes the gradients of gate and up into `grad_gate` and `grad_up`, whose rows one stride must part."""
    ffn = gate.shape[-1]
    written = (x.view(-1, ffn) for x in (grad_gate, grad_up))
    _launch(_backward_kernel, _rows(grad), _rows(gate), _rows(up), *written)


def _rows(x: Tensor) -> Tensor:
    """x as [rows, ffn]: a view where one stride leads from row to row and the last stride is 1, else a copy."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


_TILE = 1024
"""Columns of a program of four warps: each thread has one 16-byte load of bf16 in flight from each tensor.

A load takes about 0.8 us under load, in which each of an H200's 132 processors must have 4.3 TB/s * 0.8 us / 132, so
26 KB, on their way. Of the compiled programs (32 and 34 registers a thread) a processor holds 16 in forward, 64 KB, and
12 in backward, 72 KB. A larger tile would idle more in the last tile of a row: 11,008 columns are 10.75 of these.
"""


def _launch(kernel: Any, *tensors: Tensor) -> None:
    """Runs a kernel over tensors [rows, ffn]: pointers, then the strides of their rows."""
    rows, ffn = tensors[0].shape
    programs = rows * -(-ffn // _TILE)
    if programs > 0:
        kernel()[(programs,)](*tensors, *(x.stride(0) for x in tensors), ffn, tile=_TILE, num_warps=4)


@functools.cache
def _forward_kernel() -> Any:
    """Compiled for a dtype at the first launch with it, as is the kernel of backward."""
    import triton
    import triton.language as tl

    def forward(
        gate: tl.tensor,
        up: tl.tensor,
        out: tl.tensor,
        gate_stride: tl.tensor,
        up_stride: tl.tensor,
        out_stride: tl.tensor,
        ffn: tl.tensor,
        tile: tl.constexpr,
    ) -> None:
        """One program computes one tile of one row."""
        tiles = tl.cdiv(ffn, tile)
        row = (tl.program_id(0) // tiles).to(tl.int64)  # 64 bits: a batch may hold more than 2^31 elements
        column = tl.program_id(0) % tiles * tile + tl.arange(0, tile)
        inside = column < ffn
        g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * out_stride + column, g * tl.sigmoid(g) * u, mask=inside)

    return triton.jit(forward)


@functools.cache
def _backward_kernel() -> Any:
    import triton
    import triton.language as tl

    def backward(
        grad: tl.tensor,
        gate: tl.tensor,
        up: tl.tensor,
        grad_gate: tl.tensor,
        grad_up: tl.tensor,
        grad_stride: tl.tensor,
        gate_stride: tl.tensor,
        up_stride: tl.tensor,
        grad_gate_stride: tl.tensor,
        grad_up_stride: tl.tensor,
        ffn: tl.tensor,
        tile: tl.constexpr,
    ) -> None:
        """Tiles as in forward; silu is computed again from gate."""
        tiles = tl.cdiv(ffn, tile)
        row = (tl.program_id(0) // tiles).to(tl.int64)
        column = tl.program_id(0) % tiles * tile + tl.arange(0, tile)
        inside = column < ffn
        slope = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        # d silu / dg = sigmoid * (1 + g * (1 - sigmoid)) = sigmoid + silu * (1 - sigmoid)
        tl.store(grad_gate + row * grad_gate_stride + column, slope * u * (sigmoid + silu * (1 - sigmoid)), mask=inside)
        tl.store(grad_up + row * grad_up_stride + column, slope * silu, mask=inside)

    return triton.jit(backward)
