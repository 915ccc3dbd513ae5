"""Document masks: packed documents must not see each other, in outputs, in gradients, in positions or in labels."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megacode.data.packing import IGNORE, Piece, Sample, join
from megacode.doctor.finding import Finding, verdict
from megacode.doctor.kernels import dtypes, word
from megacode.doctor.versions import one_line
from megacode.kernels import dispatch
from megacode.kernels.attention import Segments

AttentionCore = Callable[[Tensor, Tensor, Tensor, Segments | None], Tensor]

BATCH, SEQUENCE, HEADS, KV_HEADS, HEAD_DIM = 2, 128, 4, 2, 64
BOUNDS = (0, 37, 38, 101, 128, 150, 256)
"""Documents of two packed sequences; the first sequence ends at 128."""
CHANGED = 2
"""The document that is changed; it has others before and behind it in its sequence."""
NOISE = 4
"""How much more than two equal runs a run with a changed document may differ: both are maxima of random numbers."""
MEND = "ask for another in the recipe (kernels.attention: torch), or set data.document_masks: false"


def check_leakage(device: torch.device) -> Iterator[Finding]:
    """Every attention backend that serves here, and the packing of documents."""
    for dtype in dtypes(device):
        task = dispatch.task(device, dtype, head_dim=HEAD_DIM, segments=True)
        for name, backend in dispatch.TABLE["attention"].items():
            if backend.refusal(task) is None:
                yield check_attention(f"masks {word(dtype)} by {name}", backend.function, device, dtype)
    yield check_packing(join)


def check_attention(title: str, attention: AttentionCore, device: torch.device, dtype: torch.dtype) -> Finding:
    """Change one document: no other document's output or gradient may change by one bit.

    Kernels whose backward adds in any order (atomics) differ between two equal runs: such gradients may differ by what
    two equal runs do, times NOISE, and by nothing where two runs agree. Whatever the order, the gradient of one
    document's output with respect to another document is a sum of zeros, and must be zero.

    As a control, the same change without bounds must show.
    """
    before, after = _inputs(device, dtype)
    documents = Segments.between(BOUNDS).to(device)
    try:
        first, again, changed = (_run(attention, inputs, documents) for inputs in (before, before, after))
        crossing = _crossing_gradient(attention, before, documents)
        control = _difference(_run(attention, before, None), _run(attention, after, None))[0]
    except Exception as error:
        return Finding(title, "WRONG", f"fails: {one_line(error)}", MEND)
    noise = _difference(first, again)
    leaks = _difference(first, changed)
    names = ("output", "gradient of q", "gradient of k", "gradient of v")
    leaking = [name for name, leak, two in zip(names, leaks, noise, strict=True) if not leak <= NOISE * two]
    if crossing != 0:
        leaking.append("gradient across documents")
    if leaking:
        return Finding(title, "WRONG", f"documents leak into each other: {', '.join(leaking)}", MEND)
    if control == 0:
        return Finding(title, "WRONG", "without bounds nothing changes either: tokens do not see each other", MEND)
    bits = "equal bits" if not any(noise) else f"{max(noise):.0e} as two equal runs"
    return Finding(title, "ok", f"one document changed, the others: {bits} (unmasked: {control:.0f})")


def _inputs(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v [batch, sequence, heads, head_dim], and the same with other values in one document."""
    generator = torch.Generator().manual_seed(0)
    before, after = [], []
    for heads in (HEADS, KV_HEADS, KV_HEADS):
        x = torch.randn(BATCH, SEQUENCE, heads, HEAD_DIM, generator=generator)
        y = x.clone()
        y.flatten(0, 1)[_document()] = 8 * torch.randn(_num_changed(), heads, HEAD_DIM, generator=generator)
        before.append(x.to(device, dtype))
        after.append(y.to(device, dtype))
    return before, after


def _run(attention: AttentionCore, inputs: list[Tensor], documents: Segments | None) -> list[Tensor]:
    """[output, gradients of q, k, v] of all documents but the changed one, tokens flattened."""
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    output = attention(q, k, v, documents)
    gradients = torch.autograd.grad(output, (q, k, v), torch.ones_like(output))
    others = torch.ones(BATCH * SEQUENCE, dtype=torch.bool, device=output.device)
    others[_document()] = False
    return [x.detach().flatten(0, 1)[others] for x in (output, *gradients)]


def _crossing_gradient(attention: AttentionCore, inputs: list[Tensor], documents: Segments) -> float:
    """Largest gradient of the changed document's output with respect to the other documents."""
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    output = attention(q, k, v, documents)
    weights = torch.zeros_like(output)
    weights.flatten(0, 1)[_document()] = 1
    gradients = torch.autograd.grad(output, (q, k, v), weights)
    for gradient in gradients:
        gradient.flatten(0, 1)[_document()] = 0
    return max(float(gradient.abs().max()) for gradient in gradients)


def _difference(some: list[Tensor], other: list[Tensor]) -> list[float]:
    return [float((x.float() - y.float()).abs().max()) for x, y in zip(some, other, strict=True)]


def _document() -> slice:
    return slice(*list(pairwise(BOUNDS))[CHANGED])


def _num_changed() -> int:
    return BOUNDS[CHANGED + 1] - BOUNDS[CHANGED]


def check_packing(pack: Callable[[Sequence[Piece], int, bool], Sample]) -> Finding:
    """Positions restart at a document, and no document predicts another one's first token."""
    lengths = (5, 1, 7, 4)
    pieces = [Piece(np.arange(10 * i, 10 * i + length), begins=True) for i, length in enumerate(lengths)]
    sample = pack(pieces, sum(lengths) - 1, True)
    ids = np.concatenate([piece.ids for piece in pieces])
    positions = np.concatenate([np.arange(length) for length in lengths])[:-1]
    labels = np.where(ids[1:] // 10 == ids[:-1] // 10, ids[1:], IGNORE)
    wrong = [key for key, want in (("positions", positions), ("labels", labels)) if _differs(sample, key, want)]
    text = f"{' and '.join(wrong)} do not stop at documents" if wrong else "positions restart, labels stop at documents"
    return verdict("packing", not wrong, text, "set data.document_masks: false and report it: the packing errs")


def _differs(sample: Sample, key: str, want: np.ndarray) -> bool:
    return not np.array_equal(getattr(sample, key), want)
