"""What one transformer block, embedding and head hold, keep for backward, multiply and move: data for the formulas.

Two kinds of blocks are described: ours (`llama`), operation by operation as megacode/model/ runs it, and the GPT block
of the published tables (`gpt`: Korthikanti et al. 2022, section 4.1), so that one set of formulas answers for both.
"""

from dataclasses import dataclass
from typing import Literal

from megacode.recipe import ModelSection, Recompute

Shared = Literal["tensor", "sequence"]
"""How tensor ranks share a tensor: by heads or features; or along the sequence, where there is sequence parallelism and
else not."""

NONE_AND_SELECTIVE: tuple[Recompute, ...] = ("none", "selective")
PART_ELEMENTS = 2**18
"""The most elements that the kernels in plain torch take at once (kernels/rows.py); Triton has no temporaries."""


@dataclass(frozen=True)
class Saved:
    """A tensor that a block's forward keeps until its backward."""

    name: str
    token_bytes: float
    """Bytes per token of a context rank, over all tensor ranks."""
    shared: Shared
    kept: tuple[Recompute, ...] = NONE_AND_SELECTIVE
    """The policies of recomputation under which it is kept."""


@dataclass(frozen=True)
class Part:
    """Temporaries of an operation that takes the rows of its tensors in parts, of at most PART_ELEMENTS."""

    width: int
    """Elements of a row, over all tensor ranks; a row is a token."""
    element_bytes: int
    """Of all temporaries together."""
    shared: Shared


@dataclass(frozen=True)
class Moment:
    """A moment of backward that can be its worst: what is there beyond what forwards kept.

    Gradients and temporaries, less what has been let go of by then.
    """

    name: str
    split: float
    """Bytes per token that tensor ranks share."""
    stream: float = 0.0
    """Bytes per token along the residual stream: whole on each tensor rank, or split by sequence parallelism."""
    copies: tuple[int, int, int] = (0, 0, 0)
    """Hidden states of all tokens of a context rank, as operands of what tensor ranks exchange: in one process; between
    tensor ranks; between tensor ranks with sequence parallelism."""
    weights: float = 0.0
    """Elements of gradients of weights, over all tensor ranks, that no accumulator has taken yet."""
    recompute: tuple[Recompute, ...] = ("none", "selective", "full")
    """The policies of recomputation under which the moment comes."""
    part: Part | None = None
    reduced: bool = False
    """Whether it is one of reducing a bucket of gradients."""


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
    moments: tuple[Moment, ...]
    """The worst ones of its backward. Full recomputation comes to them with all kept that `none` keeps."""
    kept_again: float = 0.0
    """What it keeps beyond that where full recomputation runs it again: bytes per token, shared by tensor ranks."""


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
    last_norm: float
    """Bytes per token that the norm behind the last block keeps."""
    last_norm_moment: Moment
    """Of that norm's backward."""
    tied: bool = False
    """Whether the head is the embedding's matrix (one copy on the first and one on the last stage)."""
    megatron: bool = False
    """Whether it runs as in Megatron-LM: matmuls add weights' gradients to the fp32 sums themselves, tensor ranks send
    each their share of a hidden state to the next stage, gradients are reduce-scattered, the loss works on fp32 copies
    of the logits. Ours takes a pass, sends all of it from each, all-reduces gradients below ZeRO-3, as DeepSpeed does,
    and writes the loss's gradient over the logits."""

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; both copies of tied ones count once."""
        block = self.block.matrix_parameters + self.block.replicated_parameters
        return self.layers * block + (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden


def llama(model: ModelSection, sequence: int, precision: Literal["bf16", "fp32"], context: int = 1) -> Shape:
    """Our model, as megacode/model/layers.py and llama.py compute it with the kernels of kernels/.

    What backward keeps, per token, with w bytes an element (h hidden, k kv_heads * head_dim, f ffn, a heads):
    a norm keeps its input, a float, and its output for the maps behind it; the first norm's input is the block's own,
    the second's the residual sum. Attention keeps q, k, v, its output and a float a head; SwiGLU gate and up, and their
    product for the map behind it. Context ranks keep the output of attention twice: by segment, and joined (one kernel
    for all segments has it once). They keep their own k and v, except where full recomputation has run a block again:
    those of the whole sequence.

    Args:
        model: with its vocabulary filled in.
        sequence: tokens of one sample.
        precision: of parameters and activations.
        context: ranks that share a sequence.
    """
    assert model.vocabulary is not None
    w = 2 if precision == "bf16" else 4
    h, k, f = model.hidden, model.kv_heads * model.head_dim, model.ffn
    outputs = 1 if context == 1 else 2
    saved = (
        Saved("norms' input", 2 * w * h, "sequence"),
        Saved("norms' reciprocal roots", 2 * 4, "sequence", ("none",)),
        Saved("norms' output", 2 * w * h, "sequence", ("none",)),
        Saved("q, attention output", w * h * (1 + outputs), "tensor"),
        Saved("k, v", 2 * w * k, "tensor"),
        Saved("attention's log-sum-exp", 4 * model.heads, "tensor"),
        Saved("gate, up", w * 2 * f, "tensor"),
        Saved("their product", w * f, "tensor", ("none",)),
        Saved("block input", w * h, "sequence", ("full",)),
    )
    block = Block(
        matrix_parameters=2 * h * h + 2 * h * k + 3 * h * f,
        replicated_parameters=2 * h,
        num_tensors=9,
        kv_width=k,
        saved=saved,
        traffic=_llama_traffic(w, h, k, f, context),
        attention_flops=2 * sequence * h,
        attention_backward=2.5,
        attention_again=False,
        moments=_llama_moments(w, h, f) + (_context_moments(w, h, k, f, context) if context > 1 else ()),
        kept_again=_met(w, k, context) - 2 * w * k if context > 1 else 0.0,
    )
    return Shape(
        model.layers, h, model.vocabulary, sequence, w, block, max(h * f, h * h), last_norm=2 * w * h + 4,
        last_norm_moment=Moment("last norm", 0, w * h, part=_norm_part(h)),  # its output is gone
    )  # fmt: skip


def _llama_traffic(w: int, h: int, k: int, f: int, context: int) -> tuple[Traffic, ...]:
    # k and v in one tensor and, of all ranks', those that are met, which backward does again; their gradients added to
    # zeros, and of what comes back those of k and of v.
    met = _met(w, k, context)
    gathered = Traffic(
        "whole keys and values", 4 * w * k + 2 * met + 2 * w * h,
        2 * met + 2 * w * k * context + 3 * met + 4 * w * k + 2 * w * h, True,
    )  # fmt: skip
    return (
        *([gathered] if context > 1 else []),
        Traffic("norms", 2 * 2 * w * h, 2 * 3 * w * h, False, True),
        Traffic("rope", 2 * w * (h + k), 2 * w * (h + k), True),
        Traffic("swiglu", 3 * w * f, 5 * w * f, True, True),
        # The second norm makes the first residual sum, and its backward that of the gradients.
        Traffic("residuals, copies for collectives", (2 + 7) * w * h, (1 + 16) * w * h, False),
    )


def _norm_part(h: int) -> Part:
    """Of a norm's backward: three fp32 tensors."""
    return Part(h, 3 * 4, "sequence")


def _llama_moments(w: int, h: int, f: int) -> tuple[Moment, ...]:
    """Of the feed-forward, whose backward comes first; all the while the residual stream's gradient is there (w h)."""
    kept: tuple[Recompute, ...] = ("none", "full")
    stream, norm, swiglu = w * h, _norm_part(h), Part(f, w, "tensor")
    around = (1, 1, 2)  # of gate and up: the gradient of the input, and under sequence parallelism the gathered input
    return (
        Moment("down", w * f, stream, (0, 0, 1), h * f, kept),
        Moment("down's gradient reduced", 0, stream, weights=h * f, reduced=True),
        Moment("swiglu", 2 * w * f, stream, recompute=kept, part=swiglu),
        Moment("gate, up", -w * f, stream, around, 2 * h * f, kept),
        Moment("norm", -3 * w * f, stream + w * h, recompute=kept, part=norm),
        Moment("swiglu again, down", 3 * w * f, stream, (0, 0, 1), h * f, ("selective",), part=swiglu),
        # The norm's output was made again, and is kept no more.
        Moment("norm again, gate, up", 0, stream, (2, 2, 2), 2 * h * f, ("selective",)),
        Moment("norm again", 0, stream + 2 * w * h, (0, 0, 0), 2 * h * f, ("selective",), part=norm),
    )


def _met(w: int, k: int, context: int) -> int:
    """Bytes of the keys and values that a context rank's queries meet, per token of the rank.

    Of 2 c chunks, a chunk meets those before it and itself; a rank's two meet 2 c + 1 together.
    """
    return (2 * context + 1) * w * k


def _context_moments(w: int, h: int, k: int, f: int, context: int) -> tuple[Moment, ...]:
    """Of attention's backward, when what follows in the block is gone: keys and values that are met, and gradients of
    these, of q and of the output, one copy of which is gone as well.

    Full recomputation has these keys and values already. It has another moment before, when it gathers them in the
    forward that it runs again: there are those of all ranks, the rank's own, and these as one tensor; but no outputs
    yet.
    """
    met, stream = _met(w, k, context), w * h
    none, selective = stream - 2 * w * h, stream - w * h
    gathered = 2 * w * k * context + 4 * w * k - 2 * w * h
    return (
        Moment("attention", 2 * met + w * h - 3 * w * f, none, recompute=("none",)),
        Moment("attention", 2 * met + w * h - 2 * w * f, selective, recompute=("selective",)),
        Moment("attention", met + w * h - 3 * w * f, none, recompute=("full",)),
        Moment("keys and values", gathered - 3 * w * f, none, recompute=("full",)),
    )


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
        Saved("norms' input", 4 * h, "sequence"),
        Saved("matmul inputs before attention and feed-forward", 4 * h, "sequence"),
        Saved("q, k, v, attention output", 8 * h, "tensor"),
        Saved("dropout masks", 2 * h * dropout, "sequence"),
        Saved("softmax, its dropout, its mask", 5 * scores, "tensor", ("none",)),
        Saved("gelu input and output", 4 * f, "tensor"),
        Saved("block input", 2 * h, "sequence", ("full",)),
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
        moments=(Moment("gelu", 2 * f, weights=h * f),),
    )
    return Shape(
        layers, h, vocabulary, sequence, 2, block, h * f, last_norm=4 * h, last_norm_moment=Moment("last norm", 0),
        tied=tied, megatron=True,
    )  # fmt: skip
