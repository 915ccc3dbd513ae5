"""The transformer of Code Llama (Roziere et al. 2023, section 2; Touvron et al. 2023), or one chunk of it.

Module names are those of transformers' LlamaForCausalLM: a parameter's name here is its name in every checkpoint.

In shapes, `sequence` is what a context rank holds of each sequence, and `stream` what a tensor rank holds of that
between maps: a part under sequence parallelism, else all. In one process both are the whole sequence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megacode.kernels.attention import Segments
from megacode.model.layers import Layers, Norm, PlainLayers, initial_values, part_of
from megacode.recipe import ModelSection


class Attention(nn.Module):
    """Causal self-attention with rotary positions; fewer kv_heads than heads make it grouped-query attention."""

    def __init__(self, config: ModelSection, layers: Layers) -> None:
        super().__init__()
        self.layers, self.head_dim, self.theta = layers, config.head_dim, config.rope_theta
        kv_width = config.kv_heads * config.head_dim
        self.q_proj = layers.column(config.hidden, config.hidden, config.init_std)
        self.k_proj = layers.column(config.hidden, kv_width, config.init_std)
        self.v_proj = layers.column(config.hidden, kv_width, config.init_std)
        self.o_proj = layers.row(config.hidden, config.hidden, config.init_std)

    def forward(self, x: Tensor, norm: Norm, positions: Tensor, segments: Segments | None) -> Tensor:
        """Of the norm of x: [batch, stream, hidden] -> the same"""
        q, k, v = self.layers.columns(norm, x, (self.q_proj, self.k_proj, self.v_proj))
        # [batch, sequence, this rank's heads or kv_heads, head_dim]
        q, k = self.layers.rope(q, k, positions, self.theta, self.head_dim)
        v = v.unflatten(-1, (-1, self.head_dim))
        return self.o_proj(self.layers.attention(q, k, v, segments).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelSection, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        self.gate_proj = layers.column(config.hidden, config.ffn, config.init_std)
        self.up_proj = layers.column(config.hidden, config.ffn, config.init_std)
        self.down_proj = layers.row(config.ffn, config.hidden, config.init_std)

    def forward(self, x: Tensor, branch: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """The sum of x and branch, [batch, stream, hidden] each, and this of the norm of the sum."""
        total, (gate, up) = self.layers.sum_columns(norm, x, branch, (self.gate_proj, self.up_proj))
        swiglu = self.layers.swiglu
        if self.layers.recompute == "selective":
            return total, self.down_proj(gate, up, first=swiglu)
        return total, self.down_proj(swiglu(gate, up))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelSection, layers: Layers) -> None:
        super().__init__()
        self.checkpointed = layers.recompute == "full"
        self.input_layernorm = layers.norm(config.hidden, config.norm_epsilon)
        self.self_attn = Attention(config, layers)
        self.post_attention_layernorm = layers.norm(config.hidden, config.norm_epsilon)
        self.mlp = MLP(config, layers)

    def forward(self, x: Tensor, positions: Tensor, segments: Segments | None) -> Tensor:
        """[batch, stream, hidden] -> the same"""
        if self.checkpointed and torch.is_grad_enabled():
            # Inside of the module, so that ZeRO-3's hooks on it stay outside of what runs twice.
            return checkpoint(self._run, x, positions, segments, use_reentrant=False, preserve_rng_state=False)
        return self._run(x, positions, segments)

    def _run(self, x: Tensor, positions: Tensor, segments: Segments | None) -> Tensor:
        branch = self.self_attn(x, self.input_layernorm, positions, segments)
        x, branch = self.mlp(x, branch, self.post_attention_layernorm)
        return x + branch


class Backbone(nn.Module):
    """Embedding, blocks and last norm, as far as this chunk holds them."""

    def __init__(self, config: ModelSection, layers: Layers, blocks: Sequence[int], first: bool, last: bool) -> None:
        super().__init__()
        assert config.vocabulary is not None
        self.embed_tokens = layers.embedding(config.vocabulary, config.hidden, config.init_std) if first else None
        self.layers = nn.ModuleDict({str(i): Block(config, layers) for i in blocks})
        self.norm = layers.norm(config.hidden, config.norm_epsilon) if last else None

    def forward(self, x: Tensor, positions: Tensor, segments: Segments | None) -> Tensor:
        """Token ids [batch, sequence] or [batch, stream, hidden] -> [batch, stream, hidden]"""
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        for block in self.layers.values():
            x = block(x, positions, segments)
        return x if self.norm is None else self.norm(x)


class Llama(nn.Module):
    """The whole model, or the chunk of it with the given blocks, with the embedding if `first`, the head if `last`.

    Weights are left uninitialised: `initialise`, or a checkpoint, fills them by name.
    """

    def __init__(
        self,
        config: ModelSection,
        layers: Layers | None = None,
        blocks: Sequence[int] | None = None,
        first: bool = True,
        last: bool = True,
    ) -> None:
        super().__init__()
        assert config.vocabulary is not None, "the vocabulary is filled in from the tokenizer before a model is built"
        self.parts = layers or PlainLayers()
        self.model = Backbone(config, self.parts, range(config.layers) if blocks is None else blocks, first, last)
        self.lm_head = self.parts.head(config.hidden, config.vocabulary, config.init_std) if last else None

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        segments: Segments | None = None,
        labels: Tensor | None = None,
        loss_scale: Tensor | None = None,
    ) -> Tensor:
        """One chunk's forward.

        Args:
            x: token ids [batch, sequence] for the first chunk, else hidden states [batch, stream, hidden].
            positions: rotary positions [batch, sequence], in the whole sequence or its documents.
            segments: what attention stays inside of, over the flattened batch * sequence; None: each sequence is one
                segment. Context ranks always have them (`parallel.context.own_part`).
            labels: [batch, sequence] of the last chunk; IGNORE has no loss.
            loss_scale: the gradient that backward will come to each loss with, fp32 scalar. None: not known, or 1; any
                is right, but another than was said costs a pass over the logits' gradient.

        Returns:
            Hidden states [batch, stream, hidden], for all chunks but the last; of the last, the negative
            log-likelihood of each label [batch, sequence] if there are labels (fp32, 0 where IGNORE), else this tensor
            rank's logits [batch, sequence, its part of the vocabulary].
        """
        x = self.model(x, positions, segments)
        if self.lm_head is None:
            return x
        logits = self.lm_head(x)
        return self.parts.logits(logits) if labels is None else self.parts.loss(logits, labels, loss_scale)


@torch.no_grad()
def initialise(model: Llama, seed: int) -> Llama:
    """Fill a whole, one-process model with the initial weights of a seed: those of every layout."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_values(name, part_of(parameter), seed))
    return model


def num_parameters(config: ModelSection) -> int:
    """Parameters of the whole model, counted on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama(config).parameters())
