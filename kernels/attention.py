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


def attention_torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, where a token sees itself and what precedes it: torch's own implementation.

    q [batch, sequence, heads, head_dim]; k, v [batch, sequence, kv_heads, head_dim]; head i reads kv head
    i // (heads // kv_heads). Softmax in fp32 whatever the dtype. Returns [batch, sequence, heads, head_dim].

    cu_seqlens: int32 [segments + 1], the bounds 0 = b0 <= b1 <= ... = batch * sequence of segments over the flattened
    tokens; attention stays inside a segment. Then every segment is a call of its own (no mask is materialised: memory
    stays linear where torch's fused kernels serve) and the bounds are read on the host, once a call.
    """
    assert q.shape[2] % k.shape[2] == 0, (q.shape, k.shape)
    if cu_seqlens is None:
        return _causal(q, k, v)
    bounds = cu_seqlens.tolist()
    assert bounds[0] == 0, bounds
    assert bounds[-1] == q.shape[0] * q.shape[1], (bounds, q.shape)
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    # split, not slices: its backward writes each gradient once instead of adding up one padded tensor a segment.
    segments = zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([_causal(*(x[None] for x in segment))[0] for segment in segments]).view(q.shape)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [batch, heads, sequence, head_dim]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def attention_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`attention_torch` by the flash-attn package (Dao 2023, FlashAttention-2): CUDA and bf16 only.

    With cu_seqlens the longest segment is read on the host, once a call.
    """
    flash_attn = importlib.import_module("flash_attn")  # by name: type checkers seldom have the package
    if cu_seqlens is None:
        return flash_attn.flash_attn_func(q, k, v, causal=True)
    longest_tokens = int(cu_seqlens.diff().max())
    flat = (x.flatten(0, 1) for x in (q, k, v))  # [batch * sequence, heads, head_dim]
    return flash_attn.flash_attn_varlen_func(
        *flat, cu_seqlens, cu_seqlens, longest_tokens, longest_tokens, causal=True
    ).view(q.shape)
