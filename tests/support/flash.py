"""Cases of flash attention, what is computed of them, and the same in float64; for Triton's interpreter and for a GPU.

`python -m support.flash FILE` computes all cases under the interpreter and saves {name: results} to FILE.
"""

import itertools
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megacode.kernels.attention import Segments, attention_torch
from megacode.kernels.flash_attention import Tile, Tiles, flash_attention_with_lse
from support.triton_offline import bf16_as_in_hardware

SMALL = Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
"""Several tiles at the sizes that the interpreter can do; wide and tall, so that no mix-up of the two passes."""


@dataclass(frozen=True)
class Case:
    """Inputs of attention."""

    sequence: int
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    batch: int = 1
    keys: int = 0
    """0: as many as queries."""
    bounds: tuple[int, ...] | None = None
    bounds_k: tuple[int, ...] | None = None
    layout: str = "plain"
    """plain; fused: views of one projection; heads_first: transposed views; strided: a last stride of 2."""
    dtype: torch.dtype = torch.float32
    lse: bool = False
    """Whether the log-sum-exp takes part in the loss too."""

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v that require gradients; the same numbers in every process."""
        generator = torch.Generator().manual_seed(0)
        lengths = (self.sequence, self.keys or self.sequence, self.keys or self.sequence)
        counts = (self.heads, self.kv_heads, self.kv_heads)
        width = self.head_dim * (2 if self.layout == "strided" else 1)
        if self.layout == "fused":
            fused = torch.randn(self.batch, self.sequence, sum(counts), width, generator=generator)
            tensors = list(fused.to(self.dtype).to(device).split(counts, dim=2))
        else:
            tensors = [
                torch.randn(self.batch, length, count, width, generator=generator).to(self.dtype).to(device)
                for length, count in zip(lengths, counts, strict=True)
            ]
        if self.layout == "heads_first":
            tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        if self.layout == "strided":
            tensors = [x[..., ::2] for x in tensors]
        q, k, v = (x.detach().requires_grad_() for x in tensors)
        return q, k, v

    def cu_seqlens(self, device: str = "cpu") -> tuple[Tensor | None, Tensor | None]:
        return tuple(
            None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
            for bounds in (self.bounds, self.bounds_k)
        )

    def weights(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """The gradients of out, in the case's dtype, and of the log-sum-exp."""
        generator = torch.Generator().manual_seed(1)
        out = torch.randn(self.batch, self.sequence, self.heads, self.head_dim, generator=generator)
        lse = torch.randn(self.batch, self.heads, self.sequence, generator=generator)
        return out.to(self.dtype).to(device), lse.to(device)


CASES = {
    "one_token": Case(1),
    "just_below_tiles": Case(127, head_dim=128),
    "just_above_tiles": Case(129),
    "padded_head": Case(40, head_dim=96, batch=2),
    "grouped_2": Case(40, heads=4, batch=2),
    "grouped_4": Case(40, heads=4, kv_heads=1, layout="fused"),
    "grouped_8": Case(35, heads=8, kv_heads=1, head_dim=128),
    "more_keys": Case(70, keys=170, batch=2, kv_heads=1),
    "one_query": Case(1, keys=70),
    "fused": Case(70, batch=2, kv_heads=1, layout="fused"),
    "heads_first": Case(40, batch=2, layout="heads_first"),
    "strided": Case(33, layout="strided"),
    # An empty document at the beginning, in the middle and at the end, documents of one token, one across two rows.
    "documents": Case(110, batch=2, kv_heads=1, bounds=(0, 0, 1, 2, 66, 66, 130, 220, 220), layout="fused"),
    "documents_heads_first": Case(40, batch=2, bounds=(0, 33, 80), layout="heads_first"),
    "documents_one": Case(70, bounds=(0, 70)),
    # Segments with more keys than queries, with keys and no queries, with neither.
    "documents_more_keys": Case(
        80, keys=140, kv_heads=1, bounds=(0, 1, 33, 33, 33, 50, 80), bounds_k=(0, 40, 80, 85, 85, 102, 140)
    ),
    "lse": Case(70, batch=2, lse=True),
    "documents_lse": Case(40, batch=2, bounds=(0, 7, 50, 80), lse=True),
}
CASES |= {
    f"{name}_bf16": replace(CASES[name], dtype=torch.bfloat16)
    for name in ("one_token", "just_above_tiles", "padded_head", "grouped_8", "more_keys", "documents", "fused")
}


def differentiate(attention, case: Case, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """{out, lse if there is one, grad_q, grad_k, grad_v} of `attention`, that gives out or (out, lse)."""
    device = inputs[0].device
    results = attention(*inputs, *case.cu_seqlens(device))
    out, lse = results if isinstance(results, tuple) else (results, None)
    weights, lse_weights = case.weights(device)
    loss = (out * weights.to(out.dtype)).sum()
    if case.lse:
        loss = loss + (lse * lse_weights).sum()
    grads = torch.autograd.grad(loss, inputs)
    values = {"out": out, "grad_q": grads[0], "grad_k": grads[1], "grad_v": grads[2]}
    return {key: x.detach() for key, x in (values if lse is None else values | {"lse": lse}).items()}


def by_torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> Tensor:
    """The twin."""
    if cu_seqlens is None:
        return attention_torch(q, k, v, None)
    bounds_k = None if cu_seqlens_k is None else cu_seqlens_k.tolist()
    return attention_torch(q, k, v, Segments.between(cu_seqlens.tolist(), bounds_k).to(q.device))


def definition(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None):
    """(out, lse) by the definition, segment by segment, in the dtype of the inputs."""
    batch, sequence, heads, head_dim = q.shape
    keys = k.shape[1]
    bounds = range(0, batch * sequence + 1, sequence) if cu_seqlens is None else cu_seqlens.tolist()
    bounds_k = range(0, batch * keys + 1, keys) if cu_seqlens is None else bounds
    bounds_k = bounds_k if cu_seqlens_k is None else cu_seqlens_k.tolist()
    k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.flatten(0, 1).transpose(0, 1) for x in (q, k, v))  # [heads, tokens, head_dim]
    outs, lses = [], []
    for (start, stop), (start_k, stop_k) in zip(itertools.pairwise(bounds), itertools.pairwise(bounds_k), strict=True):
        scores = q[:, start:stop] @ k[:, start_k:stop_k].transpose(1, 2) / head_dim**0.5
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril(scores.shape[2] - scores.shape[1])
        scores = scores.masked_fill(~seen, float("-inf"))
        outs.append(scores.softmax(dim=-1) @ v[:, start_k:stop_k])
        lses.append(scores.logsumexp(dim=-1) if stop > start else scores.new_empty(heads, 0))
    out = torch.cat(outs, dim=1).transpose(0, 1).reshape(batch, sequence, heads, head_dim)
    return out, torch.cat(lses, dim=1).view(heads, batch, sequence).transpose(0, 1)


def assert_as_exact_as_the_twin(actual: dict[str, Tensor], case: Case, inputs: tuple[Tensor, ...]) -> None:
    """Against float64, no result is off by more than twice what torch's attention in the same dtype is off by.

    And by 2^-22 of the largest value of all: backward makes the weights again from a log-sum-exp that was rounded to
    fp32, by half a unit in the last place of values from 4 to 8 (torch's has no such sum where it takes a mask), and
    the gradients of q and k are differences of numbers as large as the others. On a GPU, whose exponentials and
    logarithms err by two units, by 2^-20; and in bf16 also by 2^-9 of the result's largest value, since which of two
    neighbours it is rounded to is chance.
    """
    gpu = inputs[0].is_cuda
    exact = differentiate(definition, case, tuple(x.detach().double().requires_grad_() for x in inputs))
    twin = differentiate(definition if case.lse else by_torch, case, inputs)
    largest = max(expected.abs().max().item() for expected in exact.values())
    for key, expected in exact.items():
        assert actual[key].shape == expected.shape
        assert actual[key].dtype == (torch.float32 if key == "lse" else case.dtype)
        error = (actual[key].double() - expected).abs().max().item()
        own = expected.abs().max().item()
        if key in twin:
            rounding = 2**-9 * own if gpu and actual[key].dtype == torch.bfloat16 else 0.0
            slack = (2**-20 if gpu else 2**-22) * largest + rounding
            limit = 2 * (twin[key].double() - expected).abs().max().item() + slack
        else:  # the log-sum-exp
            limit = 2**-21 * max(4.0, own) if gpu else 1e-6
        assert error <= limit, f"{key}: {error} > {limit}"


PACKED = Case(140, kv_heads=1, bounds=(0, 30, 31, 110, 110, 140), layout="fused")
"""For what a document may depend on."""


def spoilt(case: Case, document: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs of one row with NaN all over one document."""
    start, stop = case.bounds[document : document + 2]
    copies = [x.detach().clone() for x in inputs]
    for x in copies:
        x[:, start:stop] = float("nan")
    return tuple(x.requires_grad_() for x in copies)


def small(*arguments) -> tuple[Tensor, Tensor]:
    return flash_attention_with_lse(*arguments, tiles=SMALL)


def alone(attention, case: Case, document: int, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Results of one document by itself, of a case of one row, under the weights that it has in the row."""
    start, stop = case.bounds[document : document + 2]
    parts = tuple(x.detach()[:, start:stop].requires_grad_() for x in inputs)
    out, lse = attention(*parts)
    weights, _ = case.weights(str(inputs[0].device))
    grads = torch.autograd.grad(out, parts, weights[:, start:stop])
    values = {"out": out, "lse": lse, "grad_q": grads[0], "grad_k": grads[1], "grad_v": grads[2]}
    return {key: x.detach() for key, x in values.items()}


def main(path: str) -> None:
    results: dict = {"imported": "triton" in sys.modules}
    bf16_as_in_hardware()
    for name, case in CASES.items():
        results[name] = differentiate(small, case, case.inputs())
    inputs = PACKED.inputs()
    results["packed"] = differentiate(small, PACKED, inputs)
    results["spoilt"] = {d: differentiate(small, PACKED, spoilt(PACKED, d, inputs)) for d in (0, 2)}
    results["alone"] = {document: alone(small, PACKED, document, inputs) for document in (0, 1, 2, 4)}
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
