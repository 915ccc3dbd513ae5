"""What one transformer block, embedding and head hold, keep for backward, multiply and move: data for the formulas.

Two kinds of blocks are described: ours (`llama`), operation by operation as megacode/model/ runs it, and the GPT block
of the published tables (`gpt`: Korthikanti et al. 2022, section 4.1), so that one set of formulas answers for both.
"""

from dataclasses import dataclass
from typing import Literal

from megacode.recipe import ModelSection, Recompute

NONE_AND_SELECTIVE: tuple[Recompute, ...] = ("none", "selective")


@dataclass(frozen=True)
class Saved:
    """A tensor that a block's forward keeps until its backward."""

    name: str
    token_bytes: float
    """Bytes per token, over all tensor ranks."""
    split: bool
    """Whether the tensor ranks share it; else each holds all of it, or its share under sequence parallelism."""
    kept: tuple[Recompute, ...] = NONE_AND_SELECTIVE
    """The policies of recomputation under which it is kept."""


@dataclass(frozen=True)
class Traffic:
    """Bytes per token that an operation bound by memory reads and writes, over all tensor ranks."""

    name: str
    forward: float
    backward: float
    split: bool
    selective: bool = False
    """Whether selective recomputation runs its forward twice."""


@dataclass(frozen=True)
class Block:
    """One transformer block."""

    matrix_parameters: int
    """Elements of its matrices, which tensor ranks share; each is one multiply-add a token."""
    replicated_parameters: int
    """Elements that each tensor rank holds whole: norms, biases after a row-parallel matrix."""
    num_tensors: int
    """Matrices, norms and biases."""
    kv_width: int
    """kv_heads x head_dim."""
    saved: tuple[Saved, ...]
    traffic: tuple[Traffic, ...]
    attention_flops: float
    """Floating-point operations of attention's forward, per token."""
    attention_backward: float
    """Operations of attention's backward over those of its forward."""
    attention_again: bool
    """Whether selective recomputation runs attention's forward twice."""
    backward_token_bytes: float
    """Gradients and temporaries, above what is kept, at the worst moment of the block's backward; of split tensors."""


@dataclass(frozen=True)
class Shape:
    """A whole model as the formulas see it."""

    layers: int
    hidden: int
    vocabulary: int
    sequence: int
    """Tokens of one sample."""
    element_bytes: int
    """2 for bf16, 4 for fp32: parameters, activations, what ranks exchange."""
    block: Block
    largest_matrix: int
    """Elements of a block's largest parameter."""
    tied: bool = False
    """Whether the head is the embedding's matrix (one copy on the first and one on the last stage)."""
    megatron: bool = False
    """Whether it runs as in Megatron-LM: matmuls add weights' gradients to the fp32 sums themselves, tensor ranks send
    each their share of a hidden state to the next stage, gradients are reduce-scattered. Ours takes a pass, sends all
    of it from each, and all-reduces gradients below ZeRO-3, as DeepSpeed does."""

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; both copies of tied ones count once."""
        block = self.block.matrix_parameters + self.block.replicated_parameters
        return self.layers * block + (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden


def llama(model: ModelSection, sequence: int, precision: Literal["bf16", "fp32"]) -> Shape:
    """Our model, as megacode/model/layers.py and llama.py compute it with plain torch.

    What backward keeps, per token, with w bytes an element (h hidden, k kv_heads * head_dim, f ffn, a heads):
    a norm keeps its fp32 input, the normalised values and its output; attention q, k, v, its output and a float a head;
    RoPE cos and sin; SwiGLU gate, up, silu(gate) and their product. Under bf16 the norm's fp32 input is a copy, and the
    block's own input is not kept; under fp32 the two are one tensor.

    Args:
        model: with its vocabulary filled in.
        sequence: tokens of one sample.
        precision: of parameters and activations.
    """
    assert model.vocabulary is not None
    w = 2 if precision == "bf16" else 4
    h, k, f = model.hidden, model.kv_heads * model.head_dim, model.ffn
    saved = (
        Saved("norms' fp32 input", 2 * 4 * h, False, ("none",)),
        Saved("normalised", 2 * w * h, False, ("none",)),
        Saved("norms' reciprocal roots", 2 * 4, False),
        Saved("norms' output", 2 * w * h, False, ("none",)),
        Saved("norms' input", 2 * w * h, False, ("selective",)),
        Saved("q, k, v, attention output", w * (2 * h + 2 * k), True),
        Saved("attention's log-sum-exp", 4 * model.heads, True),
        Saved("cos, sin", 4 * model.head_dim, False),
        Saved("gate, up", w * 2 * f, True),
        Saved("silu(gate), product", w * 2 * f, True, ("none",)),
        Saved("block input", w * h, False, ("full",)),
    )
    cast = 4 + w if w == 2 else 0  # to or from fp32; nothing where it is fp32 already
    traffic = (
        Traffic("norms", 2 * h * (2 * cast + 20 + 2 * w), 2 * h * (2 * cast + 36 + 6 * w), False, True),
        Traffic("rope", 2 * w * (h + k), 2 * w * (h + k), True),
        Traffic("swiglu", 5 * w * f, 9 * w * f, True, True),
        Traffic("residuals, copies for collectives", 10 * w * h, 19 * w * h, False),
    )
    block = Block(
        matrix_parameters=2 * h * h + 2 * h * k + 3 * h * f,
        replicated_parameters=2 * h,
        num_tensors=9,
        kv_width=k,
        saved=saved,
        traffic=traffic,
        attention_flops=2 * sequence * h,
        attention_backward=2.5,
        attention_again=False,
        backward_token_bytes=w * 2 * f,
    )
    return Shape(model.layers, h, model.vocabulary, sequence, w, block, max(h * f, h * h))


def gpt(layers: int, hidden: int, heads: int, vocabulary: int, sequence: int, *, flash: bool = False,
        tied: bool = True) -> Shape:  # fmt: skip
    """A GPT of the published tables: 4h feed-forward of two matrices, GeLU, biases, fp16 with fused kernels.

    Kept bytes are those of Korthikanti et al. 2022, section 4.1: 34 h + 5 a s per token and layer (dropout with its
    masks, attention scores stored). `flash`: attention without stored scores and without dropout, as Megatron-Core.
    """
    h, f = hidden, 4 * hidden
    dropout = 0 if flash else 1
    scores = 0.0 if flash else float(heads * sequence)
    saved = (
        Saved("norms' input", 4 * h, False),
        Saved("matmul inputs before attention and feed-forward", 4 * h, False),
        Saved("q, k, v, attention output", 8 * h, True),
        Saved("dropout masks", 2 * h * dropout, False),
        Saved("softmax, its dropout, its mask", 5 * scores, True, ("none",)),
        Saved("gelu input and output", 4 * f, True),
        Saved("block input", 2 * h, False, ("full",)),
    )
    traffic = (
        Traffic("norms", 2 * 4 * h, 2 * 6 * h, False),
        Traffic("bias, dropout, residual", 2 * (6 + dropout) * h, 2 * (8 + dropout) * h, False),
        Traffic("bias, gelu", 4 * f, 6 * f, True),
        Traffic("attention scores", 13 * scores, 19 * scores, True, True),
    )
    block = Block(
        matrix_parameters=12 * h * h + 7 * h,  # with the biases of column-parallel matrices
        replicated_parameters=6 * h,
        num_tensors=12,
        kv_width=h,
        saved=saved,
        traffic=traffic,
        attention_flops=(2 if flash else 4) * sequence * h,
        attention_backward=2.5 if flash else 2.0,
        attention_again=not flash,
        backward_token_bytes=2 * f,
    )
    return Shape(layers, h, vocabulary, sequence, 2, block, h * f, tied, megatron=True)
