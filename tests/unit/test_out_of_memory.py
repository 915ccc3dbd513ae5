"""Running out of memory: recognised, explained by the plan's formula, and what to change."""

import json
import re
import subprocess
import sys

import pytest
import torch
from support.launching import ENVIRONMENT, ROOT, write_recipe
from support.training import recipe

from megacode.plan.layout import fit
from megacode.train.out_of_memory import explain_out_of_memory, is_out_of_memory


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


LONG = {"sequence_length": 2048}


@pytest.mark.parametrize(
    ("sections", "world_size", "mend"),
    [
        ({"batch": {"micro_samples": 8}}, 1, r"lower batch\.micro_samples \(8\)"),
        ({"batch": LONG, "parallel": {"tensor": 2}}, 2, r"set parallel\.sequence: true"),
        ({"batch": LONG}, 1, r"set parallel\.recompute: selective"),
        ({"batch": LONG, "parallel": {"recompute": "selective"}}, 1, r"set parallel\.recompute: full"),
        ({"batch": LONG, "parallel": {"recompute": "full"}}, 1, r"raise parallel\.context \(1\), lower batch\.seq"),
        ({"batch": LONG, "model": {"vocabulary": 4096}}, 1, r"raise parallel\.context \(1\), lower batch\.seq"),
        ({"model": {"hidden": 1024, "heads": 8, "ffn": 4096}, "parallel": {"zero": 1}}, 1, "take more data ranks"),
        ({"model": {"hidden": 1024, "heads": 8, "ffn": 4096}, "parallel": {"zero": 1}}, 8, r"parallel\.zero: [23]"),
        (
            {"model": {"hidden": 1024, "heads": 8, "ffn": 4096}, "parallel": {"zero": 3, "reduce": "step"}},
            8,
            r"set parallel\.reduce: microbatch",
        ),
    ],
)
def test_the_largest_part_is_named_with_its_mend(sections, world_size, mend):
    config = recipe(**sections)
    text = explain_out_of_memory(config, fit(config, world_size), 0, torch.device("cpu"))
    assert "\n" not in text
    assert re.search(mend, text), text
    total, *parts = (float(value) for value in re.findall(r"([\d.]+) GiB", text)[:8])
    assert sum(parts) == pytest.approx(total, abs=0.05)


def test_a_run_without_enough_memory_says_so(tmp_path):
    """A real one: the address space is limited, and the micro-batch is far too large for it."""
    path = write_recipe(tmp_path)
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (4 << 30,) * 2); sys.argv.pop(0); "
    start = limit + "runpy.run_path(sys.argv[0], run_name='__main__')"
    batch = ["batch.micro_samples=4096", "batch.global_samples=4096", "parallel.pipeline=1"]
    done = subprocess.run(
        [sys.executable, "-c", start, "launchers/train.py", str(path), *batch],
        cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("rank 0 failed: "))
    assert "out of memory; by the plan's formula a rank of stage 0 holds" in line
    assert "lower batch.micro_samples (4096)" in line
    assert "Traceback" not in done.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["message"].startswith("out of memory")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["out_of_memory"]
