"""A forward that a receipt compares: layer by layer, each weight in memory only while it is used."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megacode.checkpoint.reader import CheckpointReader
from megacode.model.layers import PlainLayers
from megacode.model.llama import Block, Llama

ReadWeight = Callable[[str], Tensor]
"""Global name of a parameter -> its values, fp32."""


class Forward(Protocol):
    """A model in fp32, for tokens and positions [batch, sequence]."""

    def embed(self, tokens: Tensor) -> Tensor:
        """-> [batch, sequence, hidden]"""
        ...

    def block(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """[batch, sequence, hidden] -> the same"""
        ...

    def rotated(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q [batch, sequence, heads, head_dim] and k [batch, sequence, kv_heads, head_dim] of x, without its norm.

        Only products of q and k are compared: how a head is arranged is the model's own affair.
        """
        ...

    def logits(self, x: Tensor) -> Tensor:
        """After the last norm: [batch, sequence, vocabulary]"""
        ...


def stream(module: nn.Module, read: ReadWeight) -> None:
    """Make every `weight` within a module on the meta device one that is read when it is used, and then let go of."""
    for name, part in list(module.named_modules()):
        if "weight" in part._parameters:
            del part._parameters["weight"]
            part.__class__ = _streamed(type(part), f"{name}.weight" if name else "weight", read)


def _streamed(kind: type[nn.Module], name: str, read: ReadWeight) -> Any:
    return type(kind.__name__, (kind,), {"weight": property(lambda self: read(name))})


class MegacodeForward:
    """Megacode's own model, of a checkpoint; see `Forward`.

    Args:
        checkpoint: where from.
        dtype: what weights are rounded to beforehand.
    """

    def __init__(self, checkpoint: CheckpointReader, dtype: torch.dtype) -> None:
        self._model, self._parts = checkpoint.model, PlainLayers()
        self._read = lambda name: checkpoint.read_stored(name).to(dtype).float()

    def embed(self, tokens: Tensor) -> Tensor:
        embedding = self._chunk([], first=True).model.embed_tokens
        assert embedding is not None
        return embedding(tokens)

    def block(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        return self._chunk([layer])(x, positions)

    def rotated(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        block = self._chunk([layer]).model.layers[str(layer)]
        assert isinstance(block, Block)
        attention = block.self_attn
        q, k = attention.q_proj(x), attention.k_proj(x)
        return self._parts.rope(q, k, positions, self._model.rope_theta, self._model.head_dim)

    def logits(self, x: Tensor) -> Tensor:
        return self._chunk([], last=True)(x, torch.arange(x.shape[1]).expand(x.shape[:2]))

    def _chunk(self, blocks: list[int], first: bool = False, last: bool = False) -> Llama:
        with torch.device("meta"):
            chunk = Llama(self._model, self._parts, blocks, first, last)
        stream(chunk, self._read)
        return chunk
