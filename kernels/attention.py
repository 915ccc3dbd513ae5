"""The attention core: causal, grouped-query, optionally inside the segments of packed documents.

Vaswani et al. 2017, section 3.2.1; grouped queries: Ainslie et al. 2023. With s the tokens of a segment (of the
sequence where there are no segments) and h = heads * head_dim, forward takes 2 * s * h FLOPs a token, counting the
causal half only, and backward 2.5 times that.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megacode.kernels.flash_attention import flash_attention


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor of the host that the host does not wait for: to a GPU, from pinned memory."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Segments:
    """The stretches of tokens that attention stays inside of, a packed document each.

    Made once a micro-batch where the documents are known, on the host: lengths that a layer had to ask the device for
    would make the host wait for it in every layer.
    """

    cu_seqlens: Tensor
    """int32 [segments + 1], on the device: bounds 0 = b0 <= b1 <= ... of segments over the flattened queries."""
    cu_seqlens_k: Tensor
    """As many over the flattened keys: the same, or more keys than queries where these are a segment's last tokens."""
    lengths: tuple[int, ...]
    """Of the segments, in queries."""
    lengths_k: tuple[int, ...]
    """In keys."""

    @staticmethod
    def between(bounds: Sequence[int], bounds_k: Sequence[int] | None = None) -> "Segments":
        """Of bounds over queries and over keys (None: the same tokens), for attention on the CPU."""
        cu_seqlens, lengths = torch.tensor(bounds, dtype=torch.int32), _lengths(bounds)
        if bounds_k is None:
            return Segments(cu_seqlens, cu_seqlens, lengths, lengths)
        return Segments(cu_seqlens, torch.tensor(bounds_k, dtype=torch.int32), lengths, _lengths(bounds_k))

    def to(self, device: torch.device) -> Self:
        """The same for attention on a device."""
        moved = to_device(self.cu_seqlens, device)
        moved_k = moved if self.cu_seqlens_k is self.cu_seqlens else to_device(self.cu_seqlens_k, device)
        return replace(self, cu_seqlens=moved, cu_seqlens_k=moved_k)


def _lengths(bounds: Sequence[int]) -> tuple[int, ...]:
    assert bounds[0] == 0, bounds
    return tuple(stop - start for start, stop in itertools.pairwise(bounds))


def attention_torch(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, where a token sees itself and what precedes it: torch's own implementation.

    q [batch, sequence, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim], keys >= sequence: the queries are the
    last tokens of what the keys are of. Head i reads kv head i // (heads // kv_heads). Softmax in fp32 whatever the
    dtype. Returns [batch, sequence, heads, head_dim].

    segments: over the flattened batch * sequence queries and the flattened keys, of any batch; None: each sequence is
    one. With them every segment is a call of its own. No mask is materialised where a segment has as many queries as
    keys: memory stays linear where torch's fused kernels serve.
    """
    assert q.shape[2] % k.shape[2] == 0, (q.shape, k.shape)
    if segments is None:
        return _causal(q, k, v)
    # split, not slices: its backward writes each gradient once instead of adding up one padded tensor a segment.
    lengths = segments.lengths, segments.lengths_k, segments.lengths_k
    split = (x.flatten(0, 1).split(parts) for x, parts in zip((q, k, v), lengths, strict=True))
    parts = [_causal(*(x[None] for x in segment))[0] for segment in zip(*split, strict=True)]
    return torch.cat(parts).view(q.shape)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [batch, heads, sequence, head_dim]
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    from torch.nn.attention.bias import causal_lower_right  # it imports triton

    mask = causal_lower_right(queries, keys)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def attention_cudnn(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """`attention_torch` by cuDNN alone, without segments: an error where it does not serve."""
    assert segments is None, "it has no call for segments of one token"
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attention_torch(q, k, v, segments)


def attention_sdpa_flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """`attention_torch` by torch's own flash attention alone, without segments: an error where it does not serve."""
    assert segments is None, "it has no call for empty segments"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attention_torch(q, k, v, segments)


def attention_triton(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """`attention_torch` by `flash_attention`, one call whatever the segments."""
    bounds = (None, None) if segments is None else (segments.cu_seqlens, segments.cu_seqlens_k)
    return flash_attention(q, k, v, *bounds)
