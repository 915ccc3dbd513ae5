"""Llama once more, in plain torch and straight from a source's own files: what a conversion must compute the same as.

It shares nothing with megacode's model, nor with how a conversion reads a configuration and renames and arranges
weights. It follows Meta's formulation (Touvron et al. 2023): rotary positions are products of complex numbers
(Su et al. 2021, section 3.4.2), of the pairs that stand next to each other in Meta's files, and half a head apart in
HuggingFace's.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

META_NAMES = {
    "embedding": "tok_embeddings.weight", "norm": "norm.weight", "head": "output.weight",
    "before_attention": "layers.{}.attention_norm.weight", "before_mlp": "layers.{}.ffn_norm.weight",
    "q": "layers.{}.attention.wq.weight", "k": "layers.{}.attention.wk.weight",
    "v": "layers.{}.attention.wv.weight", "o": "layers.{}.attention.wo.weight",
    "gate": "layers.{}.feed_forward.w1.weight", "up": "layers.{}.feed_forward.w3.weight",
    "down": "layers.{}.feed_forward.w2.weight",
}  # fmt: skip
HF_NAMES = {
    "embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight",
    "before_attention": "model.layers.{}.input_layernorm.weight",
    "before_mlp": "model.layers.{}.post_attention_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight", "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight", "o": "model.layers.{}.self_attn.o_proj.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight", "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """See `forward.Forward`."""

    read: Callable[[str], Tensor]
    """A tensor by the source's own name and in its own arrangement."""
    names: dict[str, str]
    neighbours: bool
    """Whether rotary pairs stand next to each other."""
    heads: int
    kv_heads: int
    epsilon: float
    theta: float

    @classmethod
    def of_hf(cls, folder: Path, read: Callable[[str], Tensor]) -> "Reference":
        """That of a HuggingFace folder."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = config["num_attention_heads"]
        inside = (config.get("rope_parameters") or {}).get("rope_theta")
        theta = config.get("rope_theta", 10000.0) if inside is None else inside
        epsilon = config.get("rms_norm_eps", 1e-6)
        return cls(read, HF_NAMES, False, heads, config.get("num_key_value_heads") or heads, epsilon, theta)

    @classmethod
    def of_meta(cls, folder: Path, read: Callable[[str], Tensor], theta: float | None) -> "Reference":
        """That of Meta's files.

        Args:
            folder, read: as the fields.
            theta: where params.json says none; left out, the default of Meta's code.
        """
        params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
        heads = params["n_heads"]
        theta = params.get("rope_theta") or theta or 10000.0
        return cls(read, META_NAMES, True, heads, params.get("n_kv_heads") or heads, params["norm_eps"], theta)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.read(self.names["embedding"])[tokens].float()

    def block(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        x = x + self._attention(layer, self._norm(x, "before_attention", layer), positions)
        y = self._norm(x, "before_mlp", layer)
        gate = torch.nn.functional.silu(y @ self._weight("gate", layer).T)
        return x + (gate * (y @ self._weight("up", layer).T)) @ self._weight("down", layer).T

    def rotated(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q = (x @ self._weight("q", layer).T).unflatten(-1, (self.heads, -1))
        k = (x @ self._weight("k", layer).T).unflatten(-1, (self.kv_heads, -1))
        return self._rotate(q, positions), self._rotate(k, positions)

    def logits(self, x: Tensor) -> Tensor:
        return self._norm(x, "norm") @ self._weight("head").T

    def _weight(self, role: str, layer: int | None = None) -> Tensor:
        return self.read(self.names[role].format(layer)).float()

    def _norm(self, x: Tensor, role: str, layer: int | None = None) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt() * self._weight(role, layer)

    def _attention(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        q, k = self.rotated(layer, x, positions)
        v = (x @ self._weight("v", layer).T).unflatten(-1, (self.kv_heads, -1))
        k, v = (each.repeat_interleave(self.heads // self.kv_heads, dim=2) for each in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -math.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2) @ self._weight("o", layer).T

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """[batch, sequence, heads, head_dim] -> pair i of each head turned by position * theta ^ (-2 i / head_dim)."""
        width = x.shape[-1]
        frequencies = self.theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = positions[..., None, None].double() * frequencies
        turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        pairs = x.unflatten(-1, (-1, 2)) if self.neighbours else x.unflatten(-1, (2, -1)).transpose(-1, -2)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        return (turned if self.neighbours else turned.transpose(-1, -2)).flatten(-2)
