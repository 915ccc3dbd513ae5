"""Cross-entropy kernels against float64 and their twins, in Triton's interpreter or on a GPU; ranks are threads.

This file is also a program: `python -m support.cross_entropy FILE alone|linear` computes every case, of cross-entropy
alone or with a head, under the interpreter and saves the tensors to FILE.
"""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megacode.kernels.cross_entropy import IGNORE, TRITON, Ranks, cross_entropy_torch, cross_entropy_triton
from megacode.kernels.linear_cross_entropy import linear_cross_entropy_torch, linear_cross_entropy_triton
from support.triton_offline import bf16_as_in_hardware

WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Fellows:
    """Ranks that are threads, of which one runs at a time: until it waits for what the others give to a reduction."""

    def __init__(self, count: int) -> None:
        self.count, self.round, self.given = count, 0, {}
        self.turn = threading.Condition()

    def run(self, function: Callable[[int, Ranks], Any]) -> list[Any]:
        """What function(rank, ranks) returns on each rank."""

        def one(rank: int) -> Any:
            with self.turn:
                return function(rank, _Fellow(self, rank))

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))

    def reduce(self, rank: int, x: Tensor, combine: Callable[[Tensor], Tensor]) -> None:
        assert x.dtype == torch.float32
        self.given[rank] = x
        if len(self.given) == self.count:
            result = combine(torch.stack([self.given[each] for each in range(self.count)]))
            for each in self.given.values():
                each.copy_(result)
            self.given, self.round = {}, self.round + 1
            self.turn.notify_all()
        else:
            ended = self.round
            assert self.turn.wait_for(lambda: self.round > ended, timeout=60), "another rank has failed"


@dataclass(frozen=True)
class _Fellow:
    all: Fellows
    rank: int

    def maximum(self, x: Tensor) -> None:
        self.all.reduce(self.rank, x, lambda given: given.amax(0))

    def sum(self, x: Tensor) -> None:
        self.all.reduce(self.rank, x, lambda given: given.sum(0))


def on_ranks(count: int, function: Callable[[int, Ranks | None], Any]) -> list[Any]:
    """What function(rank, ranks) returns on each of so many ranks; one is alone and has None."""
    return [function(0, None)] if count == 1 else Fellows(count).run(function)


@dataclass(frozen=True)
class Case:
    """Logits [tokens, columns], their labels and the gradient of the losses."""

    tokens: int
    columns: int
    dtype: torch.dtype = torch.float32
    ranks: int = 1
    layout: str = "plain"
    """plain; sliced, odd: 16 or 3 columns more in memory; columns: rows are not dense; expanded: all rows are one."""
    labels: str = "some"
    """some: every third is IGNORE; all: all are."""
    logits: str = "normal"
    """normal; large: up to 1e4 of either sign; infinite: every second is -inf."""
    expected: float | None = None
    gradient: str = "expected"
    """expected: what is expected, or 1; random: each token's is another, some are 0."""

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits that have no layout yet, labels, the gradient of the losses: the same numbers in every process."""
        generator = torch.Generator().manual_seed(self.columns)
        logits = torch.randn(self.tokens, self.columns, generator=generator) * (3 if self.logits != "large" else 4000)
        logits = logits.clamp(-1e4, 1e4).to(self.dtype)
        labels = torch.randint(self.columns, (self.tokens,), generator=generator)
        if self.logits == "infinite":
            labels = labels // 2 * 2
            logits[:, 1::2] = -torch.inf
        if self.layout == "expanded":
            logits = logits[:1].expand(self.tokens, -1)
        labels[slice(None) if self.labels == "all" else slice(1, None, 3)] = IGNORE
        gradient = torch.full((self.tokens,), self.expected or 1.0)
        if self.gradient == "random":
            gradient = torch.randn(self.tokens, generator=generator)
            gradient[2::3] = 0.0
        return logits, labels, gradient

    def part(self, rank: int) -> slice:
        """A rank's columns: those of several differ in number."""
        bounds = [self.columns * index // self.ranks for index in range(self.ranks + 1)]
        return slice(bounds[rank], bounds[rank + 1])

    def lay(self, logits: Tensor, device: str) -> Tensor:
        """Logits in the case's layout, with a gradient."""
        logits = logits.to(device)
        if self.layout in ("sliced", "odd"):
            extra = 16 if self.layout == "sliced" else 3
            logits = F.pad(logits, (0, extra))[:, : logits.shape[1]]
        elif self.layout == "columns":
            logits = logits.t().contiguous().t()
        elif self.layout != "expanded":
            logits = logits.clone(memory_format=torch.contiguous_format)
        return logits.detach().requires_grad_()


def compute(case: Case, by: str, device: str = "cpu") -> list[Tensor]:
    """The losses and the logits' gradient, by `triton`, `torch` or, in float64, by `exact`."""
    logits, labels, gradient = case.inputs()
    if by == "exact":
        exact = logits.double().to(device).requires_grad_()
        losses = F.cross_entropy(exact, labels.to(device), ignore_index=IGNORE, reduction="none")
        return [losses.detach(), *torch.autograd.grad(losses, exact, gradient.to(device).double())]
    labels, gradient = labels.to(device), gradient.to(device)
    function = cross_entropy_triton if by == "triton" else cross_entropy_torch
    expected = None if case.expected is None else torch.tensor(case.expected, device=device)

    def one(rank: int, ranks: Ranks | None) -> tuple[Tensor, Tensor]:
        part = case.part(rank)
        mine = case.lay(logits[:, part], device)
        with torch.no_grad():
            unread = mine.clone()
            evaluated = function(mine, labels, part.start, ranks)
            assert torch.equal(mine, unread), "an evaluation has written"
        losses = function(mine, labels, part.start, ranks, expected)
        assert torch.equal(losses, evaluated)
        (slopes,) = torch.autograd.grad(losses, mine, gradient)
        if case.layout not in ("columns", "expanded") and case.tokens > 1:
            assert slopes.data_ptr() == mine.data_ptr(), "the gradient is somewhere else"
        return losses.detach(), slopes

    losses, slopes = zip(*on_ranks(case.ranks, one), strict=True)
    assert all(torch.equal(each, losses[0]) for each in losses)
    return [losses[0], torch.cat(slopes, dim=1)]


def _cases() -> dict[str, Case]:
    cases = {}
    for dtype, word in WORDS.items():
        some = Case(7, 136, dtype)
        plain = {f"{columns}": Case(5, columns, dtype) for columns in (1, 2, 7, 127, 128, 129, 1003, 4099)}
        plain["32016"] = Case(2, 32016, dtype, expected=0.37)
        plain |= {f"{tokens}_tokens": replace(some, tokens=tokens) for tokens in (0, 1, 129)}
        plain |= {layout: replace(some, layout=layout) for layout in ("sliced", "odd", "columns", "expanded")}
        plain["all_ignored"] = replace(some, labels="all")
        plain["all_ignored_2_ranks"] = replace(some, labels="all", ranks=2)
        for logits in ("large", "infinite"):
            plain |= {f"{logits}_{ranks}_ranks": replace(some, logits=logits, ranks=ranks) for ranks in (1, 2)}
        plain |= {f"2_ranks_{columns}": Case(5, columns, dtype, ranks=2) for columns in (2, 129, 8004)}
        plain["3_ranks_odd"] = Case(5, 1003, dtype, ranks=3, layout="odd", expected=3.0)
        for expected in (None, 0.37):
            for ranks in (1, 2):
                other = replace(some, expected=expected, gradient="random", ranks=ranks)
                plain[f"other_than_{expected}_{ranks}_ranks"] = other
        cases |= {f"{name}-{word}": case for name, case in plain.items()}
    return cases


CASES = _cases()


@dataclass(frozen=True)
class LinearCase:
    """Hidden states [tokens, hidden] and a head [rows, hidden], tokens in chunks."""

    tokens: int
    hidden: int
    rows: int
    chunk: int | None
    dtype: torch.dtype = torch.float32
    ranks: int = 1
    factor: float | None = None
    """Of all losses; None: another of each token, some 0."""
    gradient: float = 1.0
    """Of the sum."""

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, weight, labels, factors: the same numbers in every process."""
        generator = torch.Generator().manual_seed(self.rows)
        x = torch.randn(self.tokens, self.hidden, generator=generator).to(self.dtype)
        weight = (torch.randn(self.rows, self.hidden, generator=generator) / self.hidden**0.5 * 3).to(self.dtype)
        labels = torch.randint(self.rows, (self.tokens,), generator=generator)
        labels[1::3] = IGNORE
        if self.factor is not None:
            return x, weight, labels, torch.tensor(self.factor)
        factors = torch.rand(self.tokens, generator=generator)
        factors[2::3] = 0.0
        return x, weight, labels, factors

    def part(self, rank: int) -> slice:
        """A rank's rows."""
        bounds = [self.rows * index // self.ranks for index in range(self.ranks + 1)]
        return slice(bounds[rank], bounds[rank + 1])


def compute_linear(case: LinearCase, by: str, device: str = "cpu") -> list[Tensor]:
    """The sum, the losses and the gradients of x and weight, by `triton`, `torch`, `unfused` or `exact` (float64)."""
    x, weight, labels, factors = (each.to(device) for each in case.inputs())
    gradient = torch.tensor(case.gradient, device=device)
    if by in ("exact", "unfused"):
        if by == "exact":
            x, weight, factors, gradient = x.double(), weight.double(), factors.double(), gradient.double()
        x.requires_grad_(), weight.requires_grad_()
        logits = F.linear(x, weight)
        logits = logits if by == "exact" else logits.float()
        losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        total = (losses * factors).sum()
        return [each.detach() for each in (total, losses, *torch.autograd.grad(total, (x, weight), gradient))]
    function = linear_cross_entropy_triton if by == "triton" else linear_cross_entropy_torch

    def one(rank: int, ranks: Ranks | None) -> tuple[Tensor, ...]:
        part = case.part(rank)
        given, mine = x.clone().requires_grad_(), weight[part].clone().requires_grad_()
        with torch.no_grad():
            evaluated, _ = function(given, mine, labels, factors, part.start, ranks, case.chunk)
        total, losses = function(given, mine, labels, factors, part.start, ranks, case.chunk)
        assert torch.equal(total, evaluated)
        assert not losses.requires_grad
        return total.detach(), losses, *torch.autograd.grad(total, (given, mine), gradient)

    totals, losses, grads_x, grads_weight = zip(*on_ranks(case.ranks, one), strict=True)
    assert all(torch.equal(each, losses[0]) for each in losses)
    return [totals[0], losses[0], torch.stack(grads_x).float().sum(0).to(case.dtype), torch.cat(grads_weight)]


def check(
    case: Case | LinearCase, actual: list[Tensor], twin: list[Tensor], exact: list[Tensor], device: str = "cpu"
) -> None:
    """Each tensor's largest error is at most twice the twin's, or what a few roundings of the largest value cost."""
    for index, (mine, other, true) in enumerate(zip(actual, twin, exact, strict=True)):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape), case
        assert mine.isfinite().all(), case
        if mine.numel() == 0:
            continue
        # The twin may hit the exact number by luck. Storing bf16 costs half a unit in the last place; fp32 is rounded
        # at each step, and a GPU's exponential, logarithm and quotient are approximations, within two units.
        units = 0.5 if mine.dtype == torch.bfloat16 else 4 if device == "cuda" else 2
        if case.gradient not in ("expected", 1.0):  # backward rounds again
            units *= 2
        error, allowed = ((x.double() - true).abs().max().item() for x in (mine, other))
        allowed = max(2 * allowed, units * torch.finfo(mine.dtype).eps * true.abs().max().item())
        assert error <= allowed, f"tensor {index} of {case}: {error:.2e}, allowed {allowed:.2e}"


LINEAR_CASES = {
    f"{tokens}x{hidden}x{rows}-{chunk}-{ranks}_ranks-{factor}-{word}": LinearCase(
        tokens, hidden, rows, chunk, dtype, ranks, factor, gradient
    )
    for dtype, word in WORDS.items()
    for tokens, hidden, rows, chunk, ranks, factor, gradient in (
        (5, 24, 129, 1, 1, 0.125, 1.0),
        (19, 24, 129, 8, 1, None, 1.0),
        (19, 24, 129, 19, 1, 0.37, 0.3),
        (19, 16, 127, None, 1, 0.25, 1.0),
        (17, 16, 1, 8, 1, None, 1.0),
        (11, 24, 257, 8, 2, None, 1.0),
        (11, 24, 257, 128, 3, 0.25, 2.5),
    )
}


def only_once(by: str, device: str = "cpu") -> dict[str, str | None]:
    """What errors say of a second backward and of a backward through what the logits were kept for; None: no error."""
    function = cross_entropy_triton if by == "triton" else cross_entropy_torch
    linear = linear_cross_entropy_triton if by == "triton" else linear_cross_entropy_torch
    labels = torch.tensor([0, 2], device=device)

    def twice(output: Tensor) -> None:
        output.backward(retain_graph=True)
        output.backward()

    def attempt(action: Callable[[], None]) -> str | None:
        try:
            action()
        except RuntimeError as error:
            return str(error)
        return None

    def logits() -> Tensor:
        return torch.ones(2, 3, device=device, requires_grad=True) * 2

    def kept() -> None:
        x = logits().exp()  # keeps its result for its backward
        function(x, labels).sum().backward()

    x, weight = (torch.ones(rows, 4, device=device, requires_grad=True) for rows in (2, 3))
    return {
        "twice": attempt(lambda: twice(function(logits(), labels).sum())),
        "kept": attempt(kept),
        "linear": attempt(lambda: twice(linear(x, weight, labels, torch.ones((), device=device))[0])),
    }


def strange(by: str, device: str = "cpu") -> dict[str, Tensor]:
    """Losses and gradients that the cases do not have."""
    function = cross_entropy_triton if by == "triton" else cross_entropy_torch
    logits = torch.arange(12.0, device=device).view(2, 6)
    logits[1, 3] = torch.nan
    logits.requires_grad_()
    losses = function(logits, torch.tensor([2, IGNORE], device=device))
    (ignored,) = torch.autograd.grad(losses.sum(), logits)
    unknown = torch.tensor([6, -1], device=device)
    parts = on_ranks(2, lambda rank, ranks: function(torch.ones(2, 3, device=device), unknown, 3 * rank, ranks))
    return {
        "losses": losses.detach(),
        "ignored": ignored,
        "unknown": function(torch.ones(2, 6, device=device), unknown),
        "unknown_2_ranks": parts[0],
    }


if __name__ == "__main__":
    results: dict[str, Any] = {"imported": [name for name in ("triton", "deepspeed") if name in sys.modules]}
    bf16_as_in_hardware()
    torch.set_num_threads(1)  # the tensors are small
    results["once"] = only_once("triton")
    if sys.argv[2] == "linear":
        results |= {name: compute_linear(case, "triton") for name, case in LINEAR_CASES.items()}
    else:
        results |= {name: compute(case, "triton") for name, case in CASES.items()}
        results["again"], results["strange"] = compute(CASES["1003-bf16"], "triton"), strange("triton")
        rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        TRITON.rescale(rows, torch.tensor([torch.inf, 3.0]), torch.tensor([torch.inf, 2.0]))
        results["rescaled"] = rows
    torch.save(results, sys.argv[1])
