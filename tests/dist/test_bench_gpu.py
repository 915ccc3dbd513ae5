"""The benchmark of one GPU runs whole on a CPU: the trainer's own loop and the peer, and figures that add up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megacode.tools.bench.train_gpu import GIB, Device, Report, Row, choose, recipe_of, table

COMMAND = [sys.executable, "-m", "megacode.tools.bench.train_gpu"]
SEQUENCE, STEP_TOKENS, STEPS = 64, 512, 2


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """The JSON of a run and what it printed."""
    file = tmp_path_factory.mktemp("gpu") / "figures.json"
    sizes = ["--sequence-length", str(SEQUENCE), "--step-tokens", str(STEP_TOKENS), "--steps", str(STEPS)]
    command = [*COMMAND, "--device", "cpu", "--model", "nano", *sizes, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def test_both_contestants_train_the_same_model_on_the_same_shards(figures):
    found, printed = figures
    rows = found["rows"]
    assert [row["contestant"] for row in rows] == ["megacode", "transformers"]
    assert (found["skipped"], found["failed"]) == ([], [])
    ours, peer = (row["losses"] for row in rows)
    assert len(ours) == 2 + STEPS  # two warm up
    # One seed, one corpus, one sample after the other; bf16 weights here, autocast there.
    assert ours == pytest.approx(peer, rel=2e-3)
    assert all(abs(later - first) > 1e-4 for first, later in zip(ours, ours[1:], strict=False))
    assert [line.split(" | ")[2] for line in printed.splitlines()[2:4]] == ["megacode, ZeRO-2", "transformers"]
    assert "the peer is transformers alone" in printed


def test_the_figures_are_the_formulas(figures):
    found, _ = figures
    h, kv, ffn, layers, rows = 64, 32, 176, 4, 1024
    block = (h * h + h * kv + h * kv + h * h) + 3 * h * ffn + 2 * h
    parameters = layers * block + rows * h + rows * h + h
    flops = 6 * (parameters - rows * h) + 6 * layers * h * SEQUENCE
    for row in found["rows"]:
        assert (row["parameters"], row["flops_per_token"]) == (parameters, flops)
        assert row["global_samples"] * row["sequence_length"] == STEP_TOKENS
        middle, low, high = row["tokens_per_second"]
        assert 0 < low <= middle <= high
        matmul = found["device"]["matmul_teraflops"]
        assert row["mfu_of_matmul"] == pytest.approx(middle * flops / matmul / 1e12)
        assert row["mfu"] is None  # a CPU's peak is not known
        assert row["peak_bytes"] > 2**26
    ours, peer = found["rows"]
    # 2 bytes of weights and 12 of masters and moments are there at least.
    assert ours["planned_bytes"] > 14 * parameters
    assert (peer["planned_bytes"], peer["zero"]) == (None, None)


def test_what_a_device_can_hold_decides_policies_and_what_is_skipped():
    def chosen(name: str, gib: float, model: str):
        device = Device("cuda", name, int(gib * GIB), 700.0, 989.0, {})
        return choose(recipe_of(model, 4096, 65_536, Path("unused")), device)

    large = chosen("NVIDIA H200", 139.8, "7b")
    assert large.worst.total_bytes < 0.92 * 139.8 * GIB
    assert large.cost.job.offload == "none"
    assert large.changes["parallel"]["recompute"] != "none"
    small = chosen("NVIDIA H100 80GB HBM3", 79.1, "1b")
    assert small.worst.total_bytes < 0.92 * 79.1 * GIB
    for refused in (chosen("NVIDIA H100 80GB HBM3", 79.1, "7b"), chosen("NVIDIA H200", 139.8, "13b")):
        assert "the plan may fill 92%" in refused


def test_a_row_of_the_table_has_both_shares_and_says_what_failed():
    device = Device("cuda", "NVIDIA H200", 140 * GIB, 700.0, 989.0, {"torch": "2"})
    row = Row("7b", 4096, "megacode", 1, 1, 16, 2, "full", 100 * GIB, 110 * GIB, (2.0, 1.0, 3.0), 5, 0.5, 0.7, [1.0])
    lines = table(Report(device, [row], ["13b at 4,096: too large"], ["1b at 4,096, megacode: died"])).splitlines()
    assert lines[2].endswith("| 2 (1, 3) | 50.0% | 70.0% | 110.0 (100.0) |")
    assert "skipped: 13b at 4,096: too large" in lines
    assert "FAILED: 1b at 4,096, megacode: died" in lines
    assert any("989 TFLOP/s" in line and "700 TFLOP/s" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: there is no CUDA device"),
        (["--model", "8b"], "error: --model 8b is unknown"),
        (["--device", "tpu"], "error: --device tpu is unknown"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
