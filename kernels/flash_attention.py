"""Flash attention, forward and backward, in Triton: causal, grouped-query, inside the segments of packed documents.

The online softmax and its recomputation in backward: Dao et al. 2022 (FlashAttention), tiles and loops as in Dao 2023
(FlashAttention-2); that this can be said in Triton: its fused-attention tutorial. Grouped queries: Ainslie et al. 2023.

Costs, with h = heads * head_dim, k = kv_heads * head_dim and s keys before a token, on average half a document:
- forward: 4 * s * h FLOPs a token; reads q, k, v and writes out, 4 * h + 4 * k bytes in bf16, and 4 * heads for the
  log-sum-exp;
- backward: five products, 10 * s * h FLOPs a token, by which it is measured. Seven are computed: scores and their
  gradient are made once for dQ and once for dK, dV, since sums over both kinds of tiles in one kernel need atomics,
  whose order differs from run to run. 12 * h + 12 * k bytes a token, and 16 * heads for log-sum-exp and delta.
K and V are read again by every tile of queries, and q by every tile of keys: from L2, where the programs of a head,
which run at the same time, find them (8 MiB a kv head at 16k tokens of 128 in bf16).

Every sum has one order, given by shapes and tile sizes alone: results are the same bits in every run, and a document's
are the same whatever it is packed with.
"""

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Tile(NamedTuple):
    """How many queries and keys a program takes at a time, by how many warps, with loads how many steps ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tile
    grad_q: Tile
    grad_kv: Tile


# Of bf16 the quickest that compile well of those that tools/bench/flash_tiles.py tries on an H200 (docs/benchmarks.md),
# of fp32 by arithmetic. A multiprocessor of an H100 or H200 has 65536 registers, 255 a thread at most, 227 KB of shared
# memory, does 4096 bf16 FLOPs a cycle, and gets some 25 bytes a cycle from L2. In bf16 at head_dim 128, by ptxas 12.8
# (sm_90a):
# - 128 queries: a key's K and V are 512 bytes for 512 FLOPs a query, so at full speed 128 queries ask 32 bytes a cycle
#   of L2, at two thirds of it 21, and 64 queries twice that.
# - 8 warps hold 128 x 128 sums in 64 registers a thread and 128 x 64 scores in 32. Forward has the sums, the scores of
#   this tile of keys and of the next, and the weights in bf16, 64 + 32 + 32 + 16, and comes to 253 with all else; 128
#   keys at a time spill. Shared memory: q 32 KB, 3 stages of K and V 96 KB, K of the first product 16 KB.
# - grad_q: with 64 queries of 4 warps two programs have room on a multiprocessor: 255 registers a thread, 96 KB each.
#   It spills 24 bytes at most. With 3 stages the compiler lets a product run on into the next turn, which makes ptxas
#   wait for every tensor core instruction: 56 % of the speed (at head_dim 64 with triton 3.7, and not yet with 3.6).
# - grad_kv: two sums, 128 registers, and scores as above: 255 and a few spilled, most of them outside of the loops; K,
#   V 64 KB, 2 stages of q and dO 64 KB. 64 keys or 32 queries would not spill, but do half of the work a load.
# head_dim 96 is padded to 128: a third more work, where 64 + 32 would double every tile and product in the code; no
# preset has it. fp32 runs on the ordinary cores, whose operands sit in registers: the largest tiles that do not spill.
_TILES = {
    (2, 64): Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1)),
    (2, 128): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 128, 8, 2)),
    (4, 64): Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(16, 32, 8, 2)),
    (4, 128): Tiles(Tile(32, 16, 8, 2), Tile(32, 16, 8, 2), Tile(16, 32, 8, 2)),
}
"""(bytes of a number, head_dim up to a power of two) -> tiles."""


def tiles_of(num_bytes: int, head_dim: int) -> Tiles:
    """The table's tiles for numbers of so many bytes."""
    return _TILES[num_bytes, max(64, _power_of_two(head_dim))]


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, where a token sees itself and what precedes it.

    q [batch, sequence, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim], keys >= sequence: the queries are the
    last tokens of what the keys are of. Head i reads kv head i // (heads // kv_heads). bf16 or fp32, head_dim at most
    128; softmax and sums in fp32. Views are read where they lie, but for a last stride other than 1. Returns
    [batch, sequence, heads, head_dim].

    cu_seqlens: int32 [segments + 1], the bounds 0 = b0 <= b1 <= ... = batch * sequence of segments over the flattened
    tokens; attention stays inside a segment. cu_seqlens_k: as many bounds over the flattened keys (any batch), where a
    segment has more keys than queries; None: the same. The bounds stay on the device and nothing waits for it, so they
    are not checked: tokens beyond the last bound get no result.
    """
    return flash_attention_with_lse(q, k, v, cu_seqlens, cu_seqlens_k)[0]


def flash_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """`flash_attention`, and the logarithm of each softmax's denominator: fp32 [batch, heads, sequence].

    Both are differentiable, so that results over parts of the keys can be merged. tiles: those of the table if None.
    """
    batch, sequence, heads, head_dim = q.shape
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    assert k.shape == v.shape, (k.shape, v.shape)
    assert k.shape[3] == head_dim <= 128, (q.shape, k.shape)
    assert heads % k.shape[2] == 0, (q.shape, k.shape)
    tiles = tiles or tiles_of(q.element_size(), head_dim)
    if cu_seqlens is None:
        assert k.shape[0] == batch, (q.shape, k.shape)
        assert k.shape[1] >= sequence, (q.shape, k.shape)
        return _Attention.apply(q, k, v, None, None, tiles)
    bounds_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    assert bounds_k.shape == cu_seqlens.shape, (cu_seqlens.shape, bounds_k.shape)
    # One row of all tokens: no copy but for tensors whose rows do not follow each other.
    q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
    out, lse = _Attention.apply(q, k, v, cu_seqlens.contiguous(), bounds_k.contiguous(), tiles)
    return out.view(batch, sequence, heads, head_dim), lse.view(heads, batch, sequence).transpose(0, 1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, bounds_k: Tensor | None, tiles: Tiles
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        batch, sequence, heads, _ = q.shape
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(batch, heads, sequence, dtype=torch.float32, device=q.device)
        launch("forward", tiles.forward, (q, k, v, out, lse), bounds, bounds_k)
        ctx.save_for_backward(q, k, v, out, lse, bounds, bounds_k)
        ctx.tiles = tiles
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, bounds, bounds_k = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta = torch.empty_like(lse)
        of_queries = q, k, v, out, grad, lse, grad_lse, delta, grad_q
        launch("grad_q", ctx.tiles.grad_q, of_queries, bounds, bounds_k)
        launch("grad_kv", ctx.tiles.grad_kv, (q, k, v, grad, lse, delta, grad_k, grad_v), bounds, bounds_k)
        return grad_q, grad_k, grad_v, None, None, None


def launch(
    kernel: str,
    tile: Tile,
    tensors: tuple[Tensor | None, ...],
    bounds: Tensor | None = None,
    bounds_k: Tensor | None = None,
) -> None:
    """Run one of the three kernels.

    Args:
        kernel: forward, grad_q or grad_kv.
        tile: its.
        tensors: what it reads and writes, in its order, q, k and v first.
        bounds: of segments over the queries, or None.
        bounds_k: over the keys.
    """
    q, k, v, *_ = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    common, of_keys = _Launch(q, k, v, bounds, bounds_k), kernel == "grad_kv"
    grid = common.grid(tile.keys if of_keys else tile.queries, of_keys=of_keys)
    getattr(_kernels(), kernel)[grid](*tensors, **common.arguments(tile))


class _Launch(NamedTuple):
    """What the kernels of a call have in common. q, k, v [batch, tokens, heads, head_dim] with a last stride of 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    bounds: Tensor | None
    bounds_k: Tensor | None

    def grid(self, tile: int, *, of_keys: bool) -> tuple[int, int, int]:
        """(tiles of queries or of keys, heads or kv heads, batch).

        Segments have tiles of their own, so that only tiles on the diagonal need a mask. How many there are stands on
        the device; but segment s, that begins at token b, may take the numbers from b // tile + s on: the next one's
        begin ceil(length / tile) later or more. `_place` finds a number's segment by the same formula. The numbers
        too many, at most one a segment, have no tokens and end at once.
        """
        x = self.k if of_keys else self.q
        if self.bounds is None:
            return -(-x.shape[1] // tile), x.shape[2], x.shape[0]
        return x.shape[1] // tile + self.bounds.shape[0] - 1, x.shape[2], 1

    def arguments(self, tile: Tile) -> dict[str, Any]:
        heads, head_dim = self.q.shape[2:]
        strides = {
            f"{name}_{axis}_stride": stride
            for name, x in (("q", self.q), ("k", self.k), ("v", self.v))
            for axis, stride in zip(("batch", "token", "head"), x.stride()[:3], strict=True)
        }
        return strides | {
            "bounds": self.bounds,
            "bounds_k": self.bounds_k,
            "segments": 0 if self.bounds is None else self.bounds.shape[0] - 1,
            "queries": self.q.shape[1],
            "keys": self.k.shape[1],
            "scale": head_dim**-0.5,
            "heads": heads,
            "kv_heads": self.k.shape[2],
            "head_dim": head_dim,
            "head_tile": _power_of_two(head_dim),
            "queries_tile": tile.queries,
            "keys_tile": tile.keys,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`: Triton's tiles have no other sizes."""
    return 1 << (count - 1).bit_length()


@functools.cache
def _kernels() -> Any:
    """The module of the kernels, which imports triton."""
    return importlib.import_module(f"{__name__}_kernels")
