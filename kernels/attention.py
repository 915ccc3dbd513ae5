"""The attention core: causal, grouped-query, optionally inside the segments of packed documents.

Vaswani et al. 2017, section 3.2.1; grouped queries: Ainslie et al. 2023. With s the tokens of a segment (of the
sequence where there are no segments) and h = heads * head_dim, forward takes 2 * s * h FLOPs a token, counting the
causal half only, and backward 2.5 times that.
"""

import importlib
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_torch(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, where a token sees itself and what precedes it: torch's own implementation.

    q [batch, sequence, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim], keys >= sequence: the queries are the
    last tokens of what the keys are of. Head i reads kv head i // (heads // kv_heads). Softmax in fp32 whatever the
    dtype. Returns [batch, sequence, heads, head_dim].

    cu_seqlens: int32 [segments + 1], the bounds 0 = b0 <= b1 <= ... = batch * sequence of segments over the flattened
    tokens; attention stays inside a segment. cu_seqlens_k: as many bounds over the flattened keys (any batch), where a
    segment has more keys than queries; None: the same. Then every segment is a call of its own (no mask is materialised
    where it has as many queries as keys: memory stays linear where torch's fused kernels serve) and the bounds are read
    on the host, once a call.
    """
    assert q.shape[2] % k.shape[2] == 0, (q.shape, k.shape)
    if cu_seqlens is None:
        return _causal(q, k, v)
    lengths = _lengths(cu_seqlens, q)
    lengths_k = lengths if cu_seqlens_k is None else _lengths(cu_seqlens_k, k)
    # split, not slices: its backward writes each gradient once instead of adding up one padded tensor a segment.
    split = (x.flatten(0, 1).split(parts) for x, parts in ((q, lengths), (k, lengths_k), (v, lengths_k)))
    segments = zip(*split, strict=True)
    return torch.cat([_causal(*(x[None] for x in segment))[0] for segment in segments]).view(q.shape)


def _lengths(cu_seqlens: Tensor, x: Tensor) -> list[int]:
    bounds = cu_seqlens.tolist()
    assert bounds[0] == 0, bounds
    assert bounds[-1] == x.shape[0] * x.shape[1], (bounds, x.shape)
    return [end - start for start, end in itertools.pairwise(bounds)]


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [batch, heads, sequence, head_dim]
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    from torch.nn.attention.bias import causal_lower_right  # it imports triton

    mask = causal_lower_right(queries, keys)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def attention_flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None = None
) -> Tensor:
    """`attention_torch` by the flash-attn package (Dao 2023, FlashAttention-2): CUDA and bf16 only.

    Since its version 2.1 the queries are the last of the keys' tokens, as here. With cu_seqlens the longest segments
    are read on the host, once a call.
    """
    flash_attn = importlib.import_module("flash_attn")  # by name: type checkers seldom have the package
    if cu_seqlens is None:
        return flash_attn.flash_attn_func(q, k, v, causal=True)
    longest = longest_k = int(cu_seqlens.diff().max())
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    else:
        longest_k = int(cu_seqlens_k.diff().max())
    flat = (x.flatten(0, 1) for x in (q, k, v))  # [batch * sequence, heads, head_dim]
    return flash_attn.flash_attn_varlen_func(*flat, cu_seqlens, cu_seqlens_k, longest, longest_k, causal=True).view(
        q.shape
    )
