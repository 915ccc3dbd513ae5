"""Rotary position embedding on q and k (Su et al. 2021, RoFormer; theta 1e6 for long contexts: Roziere et al. 2023).

Pairs are half-split as in the HF checkpoints: component i turns with component i + head_dim / 2 by the angle
position * theta^(-2i / head_dim). Meta's own checkpoints interleave the pairs; the conversion permutes the weights.

Costs, of forward and of backward alike, for bf16 tensors of width h = heads * head_dim and k = kv_heads * head_dim:
each of q and k is read once and written once, 4 * (h + k) bytes a token, and 3 * (h + k) FLOPs a token.
"""

import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def inverse_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i / head_dim): fp32 [head_dim / 2] on `device`.

    Computed on the CPU whatever the device: at position 100,000 one unit in the last place of a frequency turns the
    pair by 0.006 radians, so every device and backend must start from the very numbers that transformers computes.
    """
    assert head_dim % 2 == 0, head_dim
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return (1.0 / theta**exponents).to(device)


def rope_torch(q: Tensor, k: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Rotates q and k by their positions, in plain torch: the twin that every other backend must equal.

    q [batch, sequence, heads, head_dim], k [batch, sequence, kv_heads, head_dim], positions int64 [batch, sequence].
    Returns new tensors of the same shapes and dtypes. Arithmetic is fp32 and rounds once, at the end. In fp32 the
    result is that of transformers' LlamaRotaryEmbedding and apply_rotary_pos_emb; in bf16 it is closer to the exact
    rotation, since transformers rounds cos, sin and both products to bf16 as well.
    """
    frequencies = inverse_frequencies(q.shape[-1], theta, q.device)
    angles = (positions[..., None].float() * frequencies)[:, :, None]  # [batch, sequence, 1, head_dim / 2]
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def rope_triton(q: Tensor, k: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """`rope_torch` as one Triton kernel for q and k together; backward is the same kernel with the angles negated.

    Shapes, dtypes and arithmetic as in `rope_torch`; saves nothing but the positions. q and k may be strided views (of
    a fused projection, of a transposed tensor); the results are contiguous.

    Not in place: autograd refuses an in-place function of two outputs whose inputs are views, and q and k are views of
    their projections. New tensors move the same 4 * (h + k) bytes a token as in place; they only allocate
    2 * (h + k) bytes a token, while the unrotated q and k, that nothing saves, are freed as the caller lets go of them.
    """
    return _Rotate.apply(q, k, positions, theta, False)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, positions: Tensor, theta: float, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(positions)
        ctx.theta, ctx.inverse = theta, inverse
        return _launch(q, k, positions, theta, inverse)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        # A rotation is orthogonal: its transpose is the rotation by the negated angle.
        (positions,) = ctx.saved_tensors
        return *_Rotate.apply(grad_q, grad_k, positions, ctx.theta, not ctx.inverse), None, None, None


def _launch(q: Tensor, k: Tensor, positions: Tensor, theta: float, inverse: bool) -> tuple[Tensor, Tensor]:
    batch, sequence, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    assert k.shape == (batch, sequence, kv_heads, head_dim), (q.shape, k.shape)
    assert positions.shape == (batch, sequence), (q.shape, positions.shape)
    # The kernel takes any strides but the last. A gradient can be an expanded scalar, say, with stride 0 everywhere.
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    if batch * sequence == 0:
        return q_out, k_out
    # About 64 elements a thread: each thread computes the sines and cosines of its columns anew, and they must not
    # become the cost.
    warps = (heads + kv_heads) * head_dim // (32 * 64)
    _kernel()[(batch * sequence,)](
        *(q, k, q_out, k_out, positions, inverse_frequencies(head_dim, theta, q.device)),
        *(sequence, *q.stride()[:3], *k.stride()[:3], *positions.stride()),
        heads=heads,
        kv_heads=kv_heads,
        half=head_dim // 2,
        heads_tile=_power_of_two(heads),
        kv_heads_tile=_power_of_two(kv_heads),
        half_tile=_power_of_two(head_dim // 2),
        inverse=inverse,
        num_warps=min(8, _power_of_two(max(1, warps))),
    )
    return q_out, k_out


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`: Triton's tiles have no other sizes."""
    return 1 << (count - 1).bit_length()


@functools.cache
def _kernel() -> Any:
    """The Triton kernel; compiled for a set of head counts and dtypes at the first launch with them."""
    import triton
    import triton.language as tl

    def rotate(
        q: tl.tensor,
        k: tl.tensor,
        q_out: tl.tensor,
        k_out: tl.tensor,
        positions: tl.tensor,
        frequencies: tl.tensor,
        sequence: tl.tensor,
        q_batch_stride: tl.tensor,
        q_sequence_stride: tl.tensor,
        q_head_stride: tl.tensor,
        k_batch_stride: tl.tensor,
        k_sequence_stride: tl.tensor,
        k_head_stride: tl.tensor,
        positions_batch_stride: tl.tensor,
        positions_sequence_stride: tl.tensor,
        heads: tl.constexpr,
        kv_heads: tl.constexpr,
        half: tl.constexpr,
        heads_tile: tl.constexpr,
        kv_heads_tile: tl.constexpr,
        half_tile: tl.constexpr,
        inverse: tl.constexpr,
    ) -> None:
        """One program rotates all heads of one token; its tiles are [heads, head_dim / 2], one a half of the pairs."""
        token = tl.program_id(0).to(tl.int64)  # 64 bits: a batch of long contexts holds more than 2^31 elements
        row, column = token // sequence, token % sequence
        pair = tl.arange(0, half_tile)
        frequency = tl.load(frequencies + pair, mask=pair < half, other=0.0)
        position = tl.load(positions + row * positions_batch_stride + column * positions_sequence_stride)
        # tl.cos and tl.sin are libdevice's full-range functions, not the hardware's approximations.
        angle = position.to(tl.float32) * frequency
        cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
        if inverse:
            sin = -sin

        head = tl.arange(0, heads_tile)[:, None]
        mask = (head < heads) & (pair < half)[None, :]
        source = q + row * q_batch_stride + column * q_sequence_stride + head * q_head_stride + pair[None, :]
        first = tl.load(source, mask=mask).to(tl.float32)
        second = tl.load(source + half, mask=mask).to(tl.float32)
        target = q_out + token * (heads * 2 * half) + head * (2 * half) + pair[None, :]
        tl.store(target, first * cos - second * sin, mask=mask)
        tl.store(target + half, second * cos + first * sin, mask=mask)

        head = tl.arange(0, kv_heads_tile)[:, None]
        mask = (head < kv_heads) & (pair < half)[None, :]
        source = k + row * k_batch_stride + column * k_sequence_stride + head * k_head_stride + pair[None, :]
        first = tl.load(source, mask=mask).to(tl.float32)
        second = tl.load(source + half, mask=mask).to(tl.float32)
        target = k_out + token * (kv_heads * 2 * half) + head * (2 * half) + pair[None, :]
        tl.store(target, first * cos - second * sin, mask=mask)
        tl.store(target + half, second * cos + first * sin, mask=mask)

    return triton.jit(rotate)
