"""Llama once more, in plain torch and straight from a source's own files: what a conversion must compute the same as.

It shares nothing with megacode's model, nor with how a conversion reads a configuration and the files of weights, and
renames and arranges these. It follows Meta's formulation (Touvron et al. 2023): rotary positions are products of
complex numbers (Su et al. 2021, section 3.4.2), of the pairs that stand next to each other in Meta's files, and half a
head apart in HuggingFace's.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacode.checkpoint.convert.library import files_by_name, read_by_library

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
SHARED_DIMS = {"embedding": 1, "q": 0, "k": 0, "v": 0, "o": 1, "gate": 0, "up": 0, "down": 1, "head": 0}
"""Along which dimension Meta's files share a weight; what is not named here each has whole."""


@dataclass(frozen=True)
class Reference:
    """See `forward.Forward`."""

    files: dict[str, list[Path]]
    """Name of a tensor -> the files that hold it, or a share of it."""
    names: dict[str, str]
    neighbours: bool
    """Whether rotary pairs stand next to each other."""
    heads: int
    kv_heads: int
    epsilon: float
    theta: float

    @classmethod
    def of_hf(cls, folder: Path, theta: float | None = None) -> "Reference":
        """That of a HuggingFace folder.

        Args:
            folder: with config.json and the weights.
            theta: instead of what config.json says.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = config["num_attention_heads"]
        rotary = [config.get("rope_parameters") or {}, config.get("rope_scaling") or {}, config]
        said = [theta, *(place.get("rope_theta") for place in rotary), 10000.0]
        theta = float(next(value for value in said if value is not None))
        epsilon = 1e-6 if config.get("rms_norm_eps") is None else float(config["rms_norm_eps"])
        kv_heads = config.get("num_key_value_heads") or heads
        return cls(files_by_name(_hf_files(folder)), HF_NAMES, False, heads, kv_heads, epsilon, theta)

    @classmethod
    def of_meta(cls, folder: Path, theta: float | None = None) -> "Reference":
        """That of Meta's files.

        Args:
            folder: with params.json and the weights.
            theta: where params.json says none; left out, the default of Meta's code.
        """
        params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
        heads = params["n_heads"]
        theta = params.get("rope_theta") or theta or 10000.0
        files = files_by_name(sorted(folder.glob("consolidated.*.pth")))
        return cls(files, META_NAMES, True, heads, params.get("n_kv_heads") or heads, params["norm_eps"], theta)

    def embed(self, tokens: Tensor) -> Tensor:
        return self._read("embedding")[tokens].float()

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
        return self._read(role, layer).float()

    def _read(self, role: str, layer: int | None = None) -> Tensor:
        name = self.names[role].format(layer)
        if len(self.files[name]) == 1 or role not in SHARED_DIMS:
            return read_by_library(self.files[name][0], name)
        return torch.cat([read_by_library(path, name) for path in self.files[name]], SHARED_DIMS[role])

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


def _hf_files(folder: Path) -> list[Path]:
    """In transformers' order: one file before several, safetensors before the older kind."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return [folder / name for name in sorted(set(weight_map.values()))]
    return []
