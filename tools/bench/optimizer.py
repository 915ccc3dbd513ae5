"""`python -m megacode.tools.bench.optimizer`: the step of AdamW by each code that can make it, on one device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacode.errors import UserError
from megacode.recipe import OptimizerSection
from megacode.tools.bench.processes import Figures, Team, command_line, figures_of
from megacode.tools.output import JsonFile, json_output

if TYPE_CHECKING:
    from torch.optim import Optimizer

SECTION = OptimizerSection(learning_rate=1e-4)
ANSWER_SECONDS = 300.0


def makers(device: str) -> dict[str, Callable[[list[dict[str, Any]]], Optimizer]]:
    """torch's three, and of the table's backends the others that serve on the device; each takes parameter groups."""
    import torch

    from megacode.engine import optimizer

    where = torch.device(device)
    settings: dict[str, Any] = {"lr": SECTION.learning_rate, "betas": (SECTION.beta1, SECTION.beta2)}
    settings["eps"] = SECTION.epsilon
    found: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
        "torch, one tensor at a time": lambda groups: torch.optim.AdamW(groups, **settings, foreach=False),
        "torch, foreach": lambda groups: torch.optim.AdamW(groups, **settings, foreach=True),
    }
    for row in optimizer.explain(where):
        if row.refusal is None:
            function = optimizer.TABLE[optimizer.OPERATION][row.backend].function
            name = "torch, fused" if row.backend == "torch" else row.backend
            found[name] = lambda groups, function=function: function(groups, SECTION, where)  # type: ignore[misc]
        else:
            typer.echo(f"left out: {row.backend}: {row.refusal}", err=True)
    return found


def serve(device: str, parameters: int) -> Callable[[str, int], dict[str, Figures]]:
    """What the process serves: the figures of so many steps."""
    return lambda request, steps: measure(device, parameters, steps)


def measure(device: str, parameters: int, steps: int) -> dict[str, Figures]:
    """Milliseconds of a step of each, in turns, so that a disturbance of the machine meets all.

    The parameters are one flat fp32 tensor, as ZeRO hands them to the optimizer; the first step is the warm-up.
    """
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    made = {}
    for name, maker in makers(device).items():
        flat = torch.nn.Parameter(torch.randn(parameters, device=device))
        flat.grad = torch.randn_like(flat)
        made[name] = maker([{"params": [flat], "weight_decay": SECTION.weight_decay}])
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(1 + steps):
        for name, optimizer in made.items():
            wait()
            started = time.perf_counter()
            optimizer.step()
            wait()
            seconds[name].append(1e3 * (time.perf_counter() - started))
    return {name: figures_of(values) for name, values in seconds.items()}


def main(
    parameters: Annotated[int, typer.Option(min=1, help="fp32 parameters; each takes 16 bytes.")] = 20_000_000,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are measured, after one to warm up.")] = 60,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Measure AdamW's step by torch's three implementations and by each other backend that serves on the device.

    DeepSpeed's is compiled at its first use, which takes a minute.

    Example: python -m megacode.tools.bench.optimizer --device cuda --parameters 1000000000
    """
    import torch

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {device}: there is none here")
    with json_output(json_file) as write:
        team = Team(serve, (device, parameters), 1, threads, ANSWER_SECONDS, device)
        found = team.ask("steps", steps)[0]
        team.stop()
        print("| AdamW's step by | ms, median (lowest, highest) |\n| --- | --- |")
        for name, (middle, low, high) in found.items():
            print(f"| {name} | {middle:.1f} ({low:.1f}, {high:.1f}) |")
        write({"device": device, "parameters": parameters, "milliseconds": found})


if __name__ == "__main__":
    command_line(main)
