"""Two forwards side by side: logits of fixed prompts, and what rotary positions do far apart."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megacode.checkpoint.convert.forward import Forward
from megacode.checkpoint.convert.receipt import Check
from megacode.checkpoint.convert.source import shapes_of
from megacode.checkpoint.convert.weights import Progress
from megacode.data.tokenizer import Tokenizer
from megacode.recipe import ModelSection

LOGIT_TOLERANCE = 1e-4
"""Largest difference of logits over their largest magnitude (or over 1, if that is less). Both sides compute in fp32
from the same weights, so only the order of sums differs, which leaves 1e-6; wrong conversions leave 1e-3 and more."""

ROTARY_TOLERANCE = 1e-3
"""Largest difference of attention scores over their largest magnitude. At position 2047 one unit in the last place of a
frequency turns a pair by 1e-4; other pairs or another theta change scores by their own size."""

WINDOW_TOKENS = 64
MAX_TEXT_WINDOWS = 1
"""With these and one of random tokens, a 7B model takes minutes on a few cores."""
NUM_PROBED_POSITIONS = 16
MAX_PROBED_POSITION = 2047
SEED = 0


def windows(model: ModelSection, tokenizer: Tokenizer, texts: list[str], rows: int) -> Tensor:
    """Token ids [windows, sequence]: the beginning of the texts laid end to end, and one window of random ids.

    Args:
        model: whose positions are not exceeded.
        tokenizer: of the texts.
        texts: what to encode.
        rows: random ids, which also fill the last window of the texts, are below this.
    """
    length = min(WINDOW_TOKENS, model.max_positions)
    ids: list[int] = []
    for text in texts:
        if len(ids) >= MAX_TEXT_WINDOWS * length:
            break
        ids += [tokenizer.bos, *tokenizer.encode(text)]
    ids = ids[: MAX_TEXT_WINDOWS * length]
    filled = -len(ids) % length + length
    generator = torch.Generator().manual_seed(SEED)
    return torch.cat([torch.tensor(ids), torch.randint(rows, (filled,), generator=generator)]).view(-1, length)


@torch.inference_mode()
def compare(
    ours: Forward,
    theirs: Forward,
    model: ModelSection,
    tokens: Tensor,
    rows: int,
    look: Callable[[str], bool],
    progress: Progress,
) -> list[Check]:
    """The checks "logits" and "rotary" of two forwards, layer by layer together.

    Args:
        ours, theirs: the forwards.
        model: their shape.
        tokens: ids [windows, sequence].
        rows: logits of so many rows are compared.
        look: called with every parameter's name, a layer's before it is computed: whoever reads them all leaves them in
            the page cache, and the disk reads each once. Returns whether it is `finite`.
        progress: called with steps done and steps to do.
    """
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    probe, probed_positions = _probe(model)
    names = list(shapes_of(model))
    spoiled = [name for name in names if ".layers." not in name and not look(name)]
    states = [side.embed(tokens) for side in (ours, theirs)]
    differences = []
    for layer in range(model.layers):
        spoiled += [name for name in names if name.startswith(f"model.layers.{layer}.") and not look(name)]
        a, b = (_scores(*side.rotated(layer, probe, probed_positions)) for side in (ours, theirs))
        differences.append(((a - b).abs().max() / a.abs().max()).item())
        states = [side.block(layer, x, positions) for side, x in zip((ours, theirs), states, strict=True)]
        progress(layer + 1, model.layers + 1)
    a, b = (side.logits(x)[..., :rows] for side, x in zip((ours, theirs), states, strict=True))
    progress(model.layers + 1, model.layers + 1)
    return [_logits(a, b, spoiled), _rotary(differences)]


def finite(weights: Tensor) -> bool:
    """Whether there is neither NaN nor an infinite value; takes no memory of the tensor's size."""
    return all(bool(end.isfinite()) for end in weights.aminmax())  # which keep a NaN


def _probe(model: ModelSection) -> tuple[Tensor, Tensor]:
    """Random hidden states [1, probed, hidden] of unit size, and the positions [1, probed] that they stand at."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(1, NUM_PROBED_POSITIONS, model.hidden, generator=generator)
    last = min(MAX_PROBED_POSITION, model.max_positions - 1)
    return x, torch.linspace(0, last, NUM_PROBED_POSITIONS).long()[None]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q [1, sequence, heads, head_dim], k [1, sequence, kv_heads, head_dim] -> [1, heads, sequence, sequence]"""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return torch.einsum("bqhd,bkhd->bhqk", q, k)


def _logits(ours: Tensor, theirs: Tensor, spoiled: list[str]) -> Check:
    difference, magnitude = (ours - theirs).abs().max().item(), ours.abs().max().item()  # torch's max keeps a NaN
    tolerance = LOGIT_TOLERANCE * max(1.0, magnitude)
    figures = {
        "largest_difference": difference,
        "tolerance": tolerance,
        "largest_logit": magnitude,
        "num_tokens": ours.shape[0] * ours.shape[1],
    }
    if difference <= tolerance:
        return Check("logits", [], figures)
    found = f"they differ by {difference:.3g}, more than {tolerance:.3g}"
    if math.isnan(difference):
        more = f" (and {len(spoiled) - 1} more)" if len(spoiled) > 1 else ""
        found = f"they are no numbers: {spoiled[0]}{more} holds NaN or infinity" if spoiled else "they are no numbers"
    return Check("logits", [found], figures)


def _rotary(differences: list[float]) -> Check:
    """Of scores of queries and keys at far apart positions, for each layer over its largest score."""
    wrong = [layer for layer, difference in enumerate(differences) if not difference <= ROTARY_TOLERANCE]
    found = f"attention scores differ in layers {wrong}: q or k rows, rotary pairs or theta are others"
    figures = {"largest_relative_difference": max(differences), "tolerance": ROTARY_TOLERANCE}
    return Check("rotary", [found] if wrong else [], figures)
