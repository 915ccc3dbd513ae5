"""The benchmark of kernels, tried on the CPU with few tokens: what it counts, whom it does not time, what it writes."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from megacode.kernels import dispatch
from megacode.kernels.rope import rope_torch
from megacode.tools.bench import kernel_cases, kernels
from megacode.tools.bench.kernels import Ceilings, Row

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_terabytes=0.01, matmul_teraflops=0.1)


def run(*arguments):
    import typer

    app = typer.Typer()
    app.command()(kernels.main)
    return CliRunner().invoke(app, ["--device", "cpu", *arguments], catch_exceptions=True)


def case(operation: str, tokens: int = 16, dtype: torch.dtype = torch.float32) -> kernel_cases.Case:
    return kernel_cases.cases(CPU, dtype, [tokens], [operation])[0]


def test_the_files_have_every_pass_of_everyone(tmp_path):
    found = run("--precision", "fp32", "--tokens", "16", "--operation", "swiglu", "--json", str(tmp_path / "k.json"),
                "--png", str(tmp_path / "k.png"))  # fmt: skip
    assert found.exit_code == 0, found.output
    kept = json.loads((tmp_path / "k.json").read_text())
    rows = [Row(**row) for row in kept["rows"]]
    assert {(row.by, row.direction) for row in rows} == {
        (by, direction)
        for by in ("triton", "liger", "torch", "eager", "compiled")
        for direction in ("forward", "backward")
    }
    for row in rows:
        if row.by in ("torch", "eager"):
            # Gate, up and their product, 4 bytes each; or gate, up, three gradients.
            moved = 4 * 16 * int(row.size.split()[-1]) * (3 if row.direction == "forward" else 5)
            assert row.rate == pytest.approx(moved / row.milliseconds / 1e9)
            assert row.share == pytest.approx(row.rate / kept["ceilings"]["copy_terabytes"])
        else:
            assert (row.milliseconds, row.chosen) == (None, False)
            assert "CUDA" in row.note
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("operation", kernel_cases.OPERATIONS)
def test_every_operation_has_cases_and_the_rivals_compute_the_same(operation, monkeypatch):
    monkeypatch.setattr(kernel_cases, "VOCABULARY", 500)
    monkeypatch.setattr(kernel_cases, "HIDDEN", 64)
    by = {(row.by, row.direction): row for row in kernels.measure(case(operation), CEILINGS)}
    timed = {name for (name, _), row in by.items() if row.milliseconds is not None}
    others = {"attention": set(), "linear_cross_entropy": {"eager", "products"}}.get(operation, {"eager"})
    assert timed == {"torch"} | others
    chosen = [name for (name, _), row in by.items() if row.chosen and row.direction != "backward"]
    assert chosen == (["torch"] if operation in dispatch.TABLE else [])


def test_attention_is_counted_in_flops_of_the_causal_half():
    sizes = kernel_cases.cases(CPU, torch.float32, [64], ["attention"])
    assert sizes[0].forward.flops == 4 * 64 * 64 * 32 * 128 / 2
    assert sizes[0].backward.flops == 2.5 * sizes[0].forward.flops
    assert sizes[3].forward.flops == sizes[0].forward.flops / 8  # eight documents


def test_who_computes_something_else_is_not_timed():
    def late(q, k, positions, theta, head_dim):
        return rope_torch(q, k, positions + 1, theta, head_dim)

    def fails(*arguments):
        raise RuntimeError("no kernel\nimage")

    wrong = replace(case("rope"), rivals={"late": late, "fails": fails})
    rows = {row.by: row for row in kernels.measure(wrong, CEILINGS) if row.direction == "forward"}
    assert rows["late"].milliseconds is None
    assert rows["late"].note.startswith("WRONG: off by")
    assert rows["fails"].note == "fails: no kernel image"
    assert rows["torch"].milliseconds is not None


def test_the_gradient_of_what_is_rotated_in_place_is_that_of_its_input():
    """Else the backward that is timed would be none."""
    arguments = case("rope").arguments()
    edges = kernels._edges(arguments)
    outputs = rope_torch(*arguments)
    ones = [torch.ones_like(x) for x in outputs]
    grads = torch.autograd.grad(outputs, edges, ones)
    assert not torch.equal(grads[0], ones[0].flatten(-2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--operation", "softmax"], "--operation softmax is unknown; known are attention"),
        (["--precision", "fp16"], "--precision bf16 or fp32"),
        (["--device", "cuda"], "this machine has no CUDA device"),
    ],
)
def test_wrong_use_is_told_in_a_line(arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert words in str(run(*arguments).exception)
