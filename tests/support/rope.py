"""Cases of rope, in Triton's interpreter or on a GPU.

This file is also a program: `python -m support.rope FILE` computes every case of CASES and what `contract` does with
rope_triton, under the interpreter, and saves it to FILE.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacode.kernels.rope import inverse_frequencies, rope_triton
from megacode.model.layers import PlainLayers
from megacode.model.llama import Llama, initialise
from megacode.recipe import ModelSection
from support.triton_offline import bf16_as_in_hardware

Rope = Callable[[Tensor, Tensor, Tensor, float, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """Inputs of rope, as the projections of a model give them."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    layout: str = "plain"
    """plain; gaps: rows of wider ones; sequence_first: transposed, and the positions one expanded row."""
    theta: float = 1e6
    batch: int = 2
    sequence: int = 5
    index: torch.dtype = torch.int64

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """q, k that require gradients, and positions from 0 to 2^20; the same numbers in every process."""
        generator = torch.Generator().manual_seed(0)
        shape = self.batch, self.sequence
        q, k = (
            torch.randn(*shape, heads * self.head_dim, generator=generator).to(device, self.dtype).requires_grad_()
            for heads in (self.heads, self.kv_heads)
        )
        positions = torch.randint(0, 2**20, shape, generator=generator)
        known = torch.tensor([0, 1, 4097, 16384, 100_000, 99_999, 2**20])[: positions.numel()]
        positions.view(-1)[: len(known)] = known
        if self.layout == "sequence_first":
            positions = positions[:1].expand(shape)
        return q, k, positions.to(device, self.index)

    def given(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        """q and k as rope gets them: no views, no leaves, with the strides of the layout."""
        return _Maps.apply(self.layout, *leaves)


class _Maps(torch.autograd.Function):
    """Copies of all its inputs by one node, as of a model's linear maps."""

    @staticmethod
    def forward(ctx: Any, layout: str, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.empty_strided(x.shape, _strides(x, layout), dtype=x.dtype, device=x.device).copy_(x) for x in leaves
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grads


def _strides(x: Tensor, layout: str) -> tuple[int, ...]:
    batch, sequence, width = x.shape
    return {
        "plain": (sequence * width, width, 1),
        "gaps": (sequence * (width + 24) + 16, width + 24, 1),
        "sequence_first": (width, batch * width, 1),
    }[layout]


CASES = {
    "multi_head": Case(4, 4, 64),
    "grouped": Case(8, 2, 32, theta=1e4),
    "odd_sizes": Case(5, 3, 48),
    "gaps": Case(4, 2, 16, layout="gaps"),
    "sequence_first": Case(4, 2, 16, layout="sequence_first", index=torch.int32),
    "bf16": Case(4, 2, 128, torch.bfloat16),
    "bf16_gaps": Case(3, 1, 96, torch.bfloat16, layout="gaps"),
    # More tokens than a tile, across sequences; more heads than a program takes, and a program with heads of q and k.
    "tiles": Case(17, 16, 128, sequence=13),
    "tiles_bf16": Case(20, 3, 64, torch.bfloat16, batch=3, sequence=15),
    "one_head": Case(1, 1, 128, batch=1, sequence=1),
    "no_tokens": Case(2, 1, 64, batch=0),
}


def exact(case: Case, x: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
    """The definition in float64, from the fp32 angle: [batch, sequence, heads * head_dim] -> the same."""
    angle = positions[..., None].float() * inverse_frequencies(case.head_dim, case.theta, x.device)
    angle = angle.double()[:, :, None] * (-1 if inverse else 1)
    first, second = x.detach().double().unflatten(-1, (-1, case.head_dim)).chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)


def compute(rope: Rope, case: Case, device: str = "cpu") -> dict[str, Tensor]:
    """What `rope` makes of a case: q, k, and gradients.

    These are of sums weighted by `weights`, of q's sum (an expanded gradient), and of q with heads before tokens.
    """
    q, k, positions = case.inputs(device)
    given = case.given(q, k)
    rotated = rope(*given, positions, case.theta, case.head_dim)
    for x, y in zip(given, rotated, strict=True):
        assert y.shape == (*x.shape[:2], x.shape[2] // case.head_dim, case.head_dim)
        assert (y.data_ptr(), y.stride()) == (x.data_ptr(), x.unflatten(-1, (-1, case.head_dim)).stride())
    by = weights(rotated)
    grad_q, grad_k = torch.autograd.grad(rotated, (q, k), by, retain_graph=True)
    (grad_of_sum,) = torch.autograd.grad(rotated[0].sum(), q, retain_graph=True)
    (grad_by_heads,) = torch.autograd.grad(
        rotated[0].transpose(1, 2).contiguous(), q, by[0].transpose(1, 2).contiguous()
    )
    assert all(map(torch.equal, by, weights(rotated)))  # gradients that were handed in are the caller's
    found = {"q": rotated[0].flatten(-2), "k": rotated[1].flatten(-2), "grad_q": grad_q, "grad_k": grad_k}
    found |= {"grad_of_sum": grad_of_sum, "grad_by_heads": grad_by_heads}
    return {key: x.detach() for key, x in found.items()}


def weights(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the outputs: multiples of 1/8 up to 2, which bf16 holds."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(-16, 17, x.shape, generator=generator) / 8).to(x.device, x.dtype) for x in outputs]


def check(case: Case, actual: dict[str, Tensor], device: str = "cpu") -> None:
    """Each tensor is the definition's, up to fp32's roundings of sine, products and sum, and that to the dtype."""
    q, k, positions = case.inputs(device)
    by = [x.flatten(-2) for x in weights(tuple(x.unflatten(-1, (-1, case.head_dim)) for x in (q, k)))]
    expected = {"q": exact(case, q, positions), "k": exact(case, k, positions)}
    expected |= {"grad_q": exact(case, by[0], positions, True), "grad_k": exact(case, by[1], positions, True)}
    expected |= {
        "grad_of_sum": exact(case, torch.ones_like(q), positions, True),
        "grad_by_heads": expected["grad_q"],
    }
    assert actual.keys() == expected.keys()
    # bf16: half a unit in the last place, at most 2^-8 relative. fp32: sine and cosine within two units of 1, 1.2e-7,
    # times values up to 5, twice; products and sum as much again at most.
    rtol = 2**-8 if case.dtype == torch.bfloat16 else 0
    for key, value in expected.items():
        assert actual[key].dtype == case.dtype
        torch.testing.assert_close(
            actual[key].double(), value, rtol=rtol, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}"
        )


def _message(function: Callable[[], Any]) -> str:
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return "no error"


def contract(rope: Rope) -> dict[str, Any]:
    """What comes of calls that rope must refuse, of a model in each mode of recomputation, and without gradients."""
    case = CASES["bf16"]
    q, k, positions = case.inputs()

    def rotate(*given: Tensor) -> tuple[Tensor, Tensor]:
        return rope(*given, positions, case.theta, case.head_dim)

    def needed_before(part: slice) -> None:
        given = case.given(q, k)
        square = given[0][..., part].square()
        rotate(*given)
        square.sum().backward()

    def differentiated_twice() -> None:
        loss = rotate(*case.given(q, k))[0].square().sum()
        torch.autograd.grad(loss, q, create_graph=True)[0].sum().backward()

    errors = {
        "needed": _message(lambda: needed_before(slice(None))),
        "part needed": _message(lambda: needed_before(slice(0, 64))),
        "leaves": _message(lambda: rotate(q, k)),
        "views": _message(lambda: rotate(*(q * 1).split((256, 256), -1))),
        "a view": _message(lambda: rotate(q * 1, (k * 1)[..., :128])),
        "twice": _message(differentiated_twice),
    }
    kept: list[Tensor] = []
    given = case.given(q, k)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rotate(*given)
    return {
        "errors": errors,
        "kept": kept,
        "no_grad": torch.no_grad(_of_views)(rope, case),
        "inference": torch.inference_mode(_of_views)(rope, case),
        "shared": _shared_gradient(rope),
        "models": {recompute: _model(rope, recompute) for recompute in ("none", "selective", "full")},
    }


def _of_views(rope: Rope, case: Case) -> dict[str, Tensor]:
    """q and k where both are views of one projection."""
    q, k, positions = case.inputs()
    fused = torch.cat((q, k), -1)
    split = fused.split((q.shape[-1], k.shape[-1]), -1)
    rope(*split, positions, case.theta, case.head_dim)
    return {"q": split[0].detach().clone(), "k": split[1].detach().clone()}


def _shared_gradient(rope: Rope) -> list[Tensor]:
    """Gradients of q and of what is added to it rotated: autograd hands both the same tensor."""
    case = CASES["multi_head"]
    q, k, positions = case.inputs()
    other = torch.zeros(*q.shape[:2], case.heads, case.head_dim, requires_grad=True)
    rotated = rope(*case.given(q, k), positions, case.theta, case.head_dim)[0]
    return list(torch.autograd.grad(other + rotated, (q, other), weights((other,))))


def _model(rope: Rope, recompute: str) -> dict[str, Tensor]:
    """Losses and gradients of a small model."""
    section = ModelSection(layers=2, hidden=64, heads=4, kv_heads=2, ffn=96, vocabulary=32, init_std=0.1)
    layers = PlainLayers(recompute=recompute)
    layers.rope = rope
    model = initialise(Llama(section, layers), seed=0)
    tokens = torch.arange(14).view(2, 7) % 5
    losses = model(tokens, torch.arange(7).expand(2, 7), labels=tokens.roll(-1, 1))
    losses.sum().backward()
    return {"losses": losses.detach()} | {name: x.grad for name, x in model.named_parameters()}


if __name__ == "__main__":
    results: dict[str, Any] = {"imported": [name for name in ("triton", "deepspeed") if name in sys.modules]}
    bf16_as_in_hardware()
    results |= {label: compute(rope_triton, case) for label, case in CASES.items()}
    results["contract"] = contract(rope_triton)
    torch.save(results, sys.argv[1])
