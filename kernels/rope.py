"""Rotary position embedding on q and k (Su et al. 2021, RoFormer; theta 1e6 for long contexts: Roziere et al. 2023).

Pairs are half-split as in the HF checkpoints: component i turns with component i + head_dim / 2 by the angle
position * theta^(-2i / head_dim). Meta's own checkpoints interleave the pairs; the conversion permutes the weights.

Every backend works in place: q and k are given away, and come back rotated. Of torch's autograd this asks that they be
no views and no leaves, which the outputs of linear maps are not; whoever else needs the unrotated values in backward
gets torch's error about a tensor modified in place.

Costs, of forward and of backward alike, for bf16 tensors of width h = heads * head_dim and k = kv_heads * head_dim:
each of q and k is read once and written once, 4 * (h + k) bytes a token, and 3 * (h + k) FLOPs a token. Kept for
backward are the positions only.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megacode.kernels.rows import row_parts


@functools.cache
def inverse_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i / head_dim): fp32 [head_dim / 2] on `device`.

    Computed on the CPU whatever the device: at position 100,000 one unit in the last place of a frequency turns the
    pair by 0.006 radians, so every device and backend must start from the very numbers that transformers computes.
    """
    assert head_dim % 2 == 0, head_dim
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return (1.0 / theta**exponents).to(device)


def rope_torch(q: Tensor, k: Tensor, positions: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rotates q and k by their positions, in place, in plain torch: the twin that every other backend must equal.

    q [batch, sequence, heads * head_dim], k [batch, sequence, kv_heads * head_dim]: as linear maps give them, the last
    stride 1; positions int [batch, sequence]. Returns the same memory as [batch, sequence, heads or kv_heads,
    head_dim]. Arithmetic is fp32 and rounds once, at the end. In fp32 the result is that of transformers'
    LlamaRotaryEmbedding and apply_rotary_pos_emb; in bf16 it is closer to the exact rotation, since transformers rounds
    cos, sin and both products to bf16 as well.

    RuntimeError of torch's where gradients are recorded and q or k is a view or a leaf. Gradients are new tensors. They
    cannot be differentiated again.
    """
    return _rotated(_turn_torch, q, k, positions, theta, head_dim)


def rope_triton(q: Tensor, k: Tensor, positions: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """`rope_torch` as one Triton kernel for q and k together; backward is the same kernel with the angles negated.

    Memory is read in 16-byte vectors where q and k begin at multiples of 16 bytes and so do their rows and heads.
    """
    return _rotated(_turn_triton, q, k, positions, theta, head_dim)


Turn = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor, bool], None]
"""(x, out, positions, frequencies, inverse): writes into `out` what becomes of q and k, which may be the same tensors.

x, out [batch, sequence, heads, head_dim] for q and for k, whose last two dimensions are one stretch of memory.
"""


def _rotated(turn: Turn, q: Tensor, k: Tensor, positions: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    assert positions.shape == q.shape[:2] == k.shape[:2], (q.shape, k.shape, positions.shape)
    assert q.stride(-1) == k.stride(-1) == 1, (q.stride(), k.stride())
    assert q is not k, "each is written"
    q, k = _Rotate.apply(turn, q, k, positions, inverse_frequencies(head_dim, theta, q.device))
    return q.unflatten(-1, (-1, head_dim)), k.unflatten(-1, (-1, head_dim))


class _Rotate(torch.autograd.Function):
    """On q and k as they come from their maps: torch has no in-place node of two outputs whose inputs are views."""

    @staticmethod
    def forward(
        ctx: Any, turn: Turn, q: Tensor, k: Tensor, positions: Tensor, frequencies: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.turn, ctx.frequencies = turn, frequencies
        ctx.save_for_backward(positions)
        ctx.mark_dirty(q, k)
        heads = [_heads(x, frequencies) for x in (q, k)]
        turn(heads, heads, positions, frequencies, False)
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (positions,), frequencies = ctx.saved_tensors, ctx.frequencies
        # Not in place: autograd may have given the same gradient to others. It can be an expanded scalar, say, with
        # stride 0 everywhere.
        grads = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in grads)
        out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in grads]
        # A rotation is orthogonal: its transpose is the rotation by the negated angle.
        given, made = ([_heads(x, frequencies) for x in each] for each in (grads, out))
        ctx.turn(given, made, positions, frequencies, True)
        return None, *out, None, None


def _heads(x: Tensor, frequencies: Tensor) -> Tensor:
    """[..., heads * head_dim] -> [..., heads, head_dim]"""
    return x.unflatten(-1, (-1, 2 * len(frequencies)))


def _turn_torch(
    x: Sequence[Tensor], out: Sequence[Tensor], positions: Tensor, frequencies: Tensor, inverse: bool
) -> None:
    angles = (positions[..., None].float() * frequencies)[:, :, None]  # [batch, sequence, 1, head_dim / 2]
    cos, sin = angles.cos(), angles.sin()
    if inverse:
        sin = -sin
    for source, target in zip(x, out, strict=True):
        for block, place, c, s in row_parts(source, target, cos, sin, dim=1):
            first, second = block.float().chunk(2, dim=-1)
            left, right = first * c, first * s
            place_first, place_second = place.chunk(2, dim=-1)
            torch.addcmul(left, second, s, value=-1, out=place_first)
            torch.addcmul(right, second, c, out=place_second)


_TILE, _HEADS, _WARPS = 1024, 16, 4
"""Pairs of a head that a program of four warps holds, 8 in each thread, and how many heads it takes one by one.

A thread computes the sines and cosines of its 8 pairs, keeps them for all heads, and no other thread of the program
computes them again. Compiled for Hopper, full-range sine and cosine with all that precedes them are 74 instructions a
pair (up to angles of 105,615; above, about four times as many), and a rotation is 13.5. With 64 heads of 128, a token
has 4,096 pairs and, at 16 heads a program, 4 times 64 angles: 74,000 instructions. An H200's 4.3 TB/s are 18.6 bytes a
cycle for each of its processors, which begin 128 instructions in it: a token's 32 KB take 1,760 cycles, in which they
could begin 225,000.

A load takes about 0.8 us under load, in which each of the 132 processors must have 4.3 TB/s * 0.8 us / 132, so 26 KB,
on their way, reads and writes together. In bf16 a thread takes 64 registers and has two 16-byte loads in flight, the
next head's before this one's are written: 8 programs on a processor have 32 KB of reads on their way. 8,192 tokens of
64 heads are 2,048 programs, and 1,056 run at a time.
"""


def _turn_triton(
    x: Sequence[Tensor], out: Sequence[Tensor], positions: Tensor, frequencies: Tensor, inverse: bool
) -> None:
    batch, sequence, *_ = x[0].shape
    num_heads = [each.shape[2] for each in x]
    constants = _tile(len(frequencies))
    groups = -(-sum(num_heads) // _HEADS)
    programs = -(-batch * sequence // constants["tokens_tile"]) * groups
    if programs == 0:
        return
    _kernel()[(programs,)](
        *(*x, *out, positions, frequencies, batch * sequence, sequence),
        *(stride for each in (*x, *out, positions) for stride in each.stride()[:2]),
        *(*num_heads, -(-sum(num_heads) // groups), groups),
        **constants,
        inverse=inverse,
        num_warps=_WARPS,
    )


def _tile(half: int) -> dict[str, int]:
    """The kernel's constants for a head_dim of 2 * half."""
    half_tile = 1 << (half - 1).bit_length()
    return {"half": half, "half_tile": half_tile, "tokens_tile": max(1, _TILE // half_tile)}


@functools.cache
def _kernel() -> Any:
    """The Triton kernel; compiled for a head_dim and dtype at the first launch with them."""
    import triton
    import triton.language as tl

    def rotate(
        q: tl.tensor,
        k: tl.tensor,
        q_out: tl.tensor,
        k_out: tl.tensor,
        positions: tl.tensor,
        frequencies: tl.tensor,
        tokens: tl.tensor,
        sequence: tl.tensor,
        q_batch_stride: tl.tensor,
        q_stride: tl.tensor,
        k_batch_stride: tl.tensor,
        k_stride: tl.tensor,
        q_out_batch_stride: tl.tensor,
        q_out_stride: tl.tensor,
        k_out_batch_stride: tl.tensor,
        k_out_stride: tl.tensor,
        positions_batch_stride: tl.tensor,
        positions_stride: tl.tensor,
        heads: tl.tensor,
        kv_heads: tl.tensor,
        group: tl.tensor,
        groups: tl.tensor,
        half: tl.constexpr,
        half_tile: tl.constexpr,
        tokens_tile: tl.constexpr,
        inverse: tl.constexpr,
    ) -> None:
        """One program rotates a group of heads, counted through q's and then k's, of a tile of tokens.

        Programs of the same tokens are neighbours. Tiles are [tokens, head_dim / 2], one a half of the pairs.
        """
        token = tl.program_id(0) // groups * tokens_tile + tl.arange(0, tokens_tile)
        pair, width = tl.arange(0, half_tile), 2 * half
        mask = (token < tokens)[:, None] & (pair < half)[None, :]
        # 64 bits: a batch of long contexts holds more than 2^31 elements.
        row, column = (token // sequence).to(tl.int64), (token % sequence).to(tl.int64)
        q_place = (row * q_batch_stride + column * q_stride)[:, None] + pair[None, :]
        k_place = (row * k_batch_stride + column * k_stride)[:, None] + pair[None, :]
        q_target = (row * q_out_batch_stride + column * q_out_stride)[:, None] + pair[None, :]
        k_target = (row * k_out_batch_stride + column * k_out_stride)[:, None] + pair[None, :]

        start = tl.program_id(0) % groups * group
        stop = tl.minimum(start + group, heads + kv_heads)
        source = q + start * width + q_place if start < heads else k + (start - heads) * width + k_place
        next_first, next_second = tl.load(source, mask=mask), tl.load(source + half, mask=mask)

        position = tl.load(
            positions + row * positions_batch_stride + column * positions_stride, mask=token < tokens, other=0
        )
        frequency = tl.load(frequencies + pair, mask=pair < half, other=0.0)
        # tl.cos and tl.sin are libdevice's full-range functions, not the hardware's approximations.
        angle = position.to(tl.float32)[:, None] * frequency[None, :]
        cos, sin = tl.cos(angle), tl.sin(angle)
        if inverse:
            sin = -sin

        for head in range(start, stop):
            first, second = next_first.to(tl.float32), next_second.to(tl.float32)
            ahead = head + 1
            source = q + ahead * width + q_place if ahead < heads else k + (ahead - heads) * width + k_place
            more = mask & (ahead < stop)
            next_first, next_second = tl.load(source, mask=more), tl.load(source + half, mask=more)
            target = q_out + head * width + q_target if head < heads else k_out + (head - heads) * width + k_target
            tl.store(target, first * cos - second * sin, mask=mask)
            tl.store(target + half, second * cos + first * sin, mask=mask)

    counts = ["tokens", "sequence", "heads", "kv_heads", "group", "groups"]
    return triton.jit(rotate, do_not_specialize=counts)  # not compiled anew for counts of 1 or multiples of 16
