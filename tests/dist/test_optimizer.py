"""What an engine's update does to masters and moments is AdamW in float64, whichever backend and arithmetic."""

import json
import subprocess
import sys

import pytest
import torch
from support.skipping import check_left_out
from support.stepping import COMPILED, adamw, updates
from support.training import recipe

BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("deepspeed", marks=COMPILED)])
OFFLOAD = "ds_configs/zero3_offload.json"


@BACKENDS
@pytest.mark.parametrize(
    ("zero", "precision", "file"), [(1, "fp32", None), (1, "bf16", None), (3, "bf16", None), (3, "bf16", OFFLOAD)]
)
def test_updates_are_adamws_on_fp32_masters(worlds, backend, zero, precision, file):
    section = {"learning_rate": 1e-2, "epsilon": 1e-3, "clip": 0.5, "backend": backend}
    config = recipe(parallel={"zero": zero}, precision=precision, optimizer=section, deepspeed_config=file)
    rates = [1e-2, 2e-2, 5e-3]
    for seen in worlds(2).run(updates, config, rates):
        assert seen[0]["backends"]["optimizer"] == backend
        expected = seen[0]["state"]
        for number, (rate, after) in enumerate(zip(rates, seen[1:], strict=True), start=1):
            assert after["count"] == number
            for name, gradient in after["gradients"].items():
                decay = config.optimizer.weight_decay if "norm" not in name else 0.0
                expected[name] = adamw(expected[name], gradient, number, config.optimizer, rate, decay)
                for have, want in zip(after["state"][name], expected[name], strict=True):
                    torch.testing.assert_close(have, want, rtol=2e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@COMPILED
@pytest.mark.parametrize("file", [None, OFFLOAD])
def test_deepspeeds_leaves_bad_steps_out(worlds, file):
    section = {"learning_rate": 1e-2, "backend": "deepspeed"}
    config = recipe(parallel={"zero": 3}, optimizer=section, deepspeed_config=file)
    check_left_out(worlds(2), config)


def test_the_benchmark_of_steps_has_torchs_three(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")  # DeepSpeed's would be compiled
    command = [sys.executable, "-m", "megacode.tools.bench.optimizer", "--parameters", "1000", "--steps", "2", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["milliseconds"]
    assert list(found) == ["torch, one tensor at a time", "torch, foreach", "torch, fused"]
    assert all(0 < low <= middle <= high for middle, low, high in found.values())
    assert "left out: deepspeed: DeepSpeed compiles it and there is no C++ compiler" in done.stderr
