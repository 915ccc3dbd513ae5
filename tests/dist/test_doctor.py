"""The doctor's checks on several processes: right here, and wrong where something is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import doctor as cases
from support.doctor import without
from support.training import reference

from megacode.doctor import layouts, links
from megacode.doctor.probe import Outcome, compare, one_process
from megacode.doctor.processes import Processes, RanksError
from megacode.doctor.run import check_in_processes

ROOT = Path(__file__).parents[2]


# ---- layouts, clipping, masters


@pytest.mark.parametrize(
    ("num_processes", "expected"),
    [
        (2, [(1, 2), (2, 1), (1, 1)]),
        (3, [(1, 1)]),
        (4, [(2, 2), (1, 2)]),
        (6, [(1, 2), (2, 1)]),
        (8, [(2, 2)]),
        (64, [(2, 2)]),
    ],
)
def test_every_axis_is_tried(num_processes, expected):
    assert layouts.layouts(num_processes) == expected
    for tensor, pipeline in expected:
        layouts.fit(layouts.recipe(num_processes, tensor, pipeline), num_processes)


def test_what_is_right(worlds):
    findings = [
        finding
        for check in (layouts.check_layouts, layouts.check_clipping, layouts.check_masters)
        for finding in check(worlds(4).run, 4)
    ]
    names = ["TP2 x PP2 x DP1", "TP1 x PP2 x DP2", "clipping", "bf16, fp32 masters"]
    assert [(finding.name, finding.state) for finding in findings] == [(name, "ok") for name in names]


@pytest.mark.parametrize("cure", ["mark_norm_owner", "start_backward", "accumulation of 1"])
def test_layouts_that_train_wrongly_are_found(worlds, cure):
    def run(*case):
        return worlds(4).run(without, cure, *case)

    assert "WRONG" in [finding.state for finding in layouts.check_layouts(run, 4)]


def test_wrong_clipping_is_found(worlds):
    """A norm that leaves out stages clips too little: the update is wrong as well, and not the norm alone."""
    config = layouts.recipe(4, 2, 2, optimizer=layouts.CLIPPED)
    expected = one_process(config, layouts.STEPS)
    actual = worlds(4).run(without, "mark_norm_owner", layouts.train, config, layouts.STEPS)[0]
    assert layouts.judge("clipping", actual, expected, "").state == "WRONG"
    assert compare(actual, expected).weight > 100 * layouts.TOLERANCE
    actual.norms = expected.norms
    assert layouts.judge("clipping", actual, expected, "").state == "WRONG"
    unclipped = one_process(layouts.recipe(4, 2, 2, optimizer={**layouts.CLIPPED, "clip": 0.0}), layouts.STEPS)
    assert compare(unclipped, expected).weight > 100 * layouts.TOLERANCE


def test_masters_in_bf16_are_found():
    config = layouts.recipe(4, 2, 2, precision="bf16", optimizer=layouts.SMALL_STEPS)
    expected = one_process(config, 1)
    assert layouts.judge_masters(config, expected, expected).state == "ok"
    start = {name: layouts.initial(config, name, weight) for name, weight in expected.weights.items()}
    stuck = {name: (weight.bfloat16() != start[name].bfloat16()) for name, weight in expected.weights.items()}
    moved = {name: torch.where(stuck[name], weight, start[name]) for name, weight in expected.weights.items()}
    assert layouts.judge_masters(config, Outcome(expected.losses, expected.norms, moved), expected).state == "WRONG"
    far = Outcome([1.01 * expected.losses[0]], expected.norms, expected.weights)
    assert layouts.judge_masters(config, far, expected).state == "WRONG"


def test_the_reference_is_a_training():
    """Against the reference of the other tests, which shares neither optimizer groups nor samples' code with it."""
    config = layouts.recipe(4, 2, 2, optimizer={"learning_rate": 1e-2, "clip": 0.5}, data={"train": "unused"})
    config = config.model_copy(update={"seed": 7})
    with pytest.MonkeyPatch.context() as patch:
        from support import training

        samples = {step: training.samples(config, step) for step in range(3)}
        patch.setattr("megacode.doctor.probe.Samples.__init__", lambda self, recipe, step: fill(self, recipe, samples[step]))
        actual = one_process(config, 3)
    expected = reference(config, 3, fused=True)  # as the doctor's
    assert compare(actual, Outcome(expected.losses, expected.norms, expected.weights)).largest < 1e-6


def fill(self, recipe, drawn):
    self.recipe, (self.tokens, self.labels) = recipe, drawn
    self.num_valid = int((self.labels != -100).sum())


def test_differences():
    some = Outcome([2.0, 1.0], [1.0, 1.0], {"a": torch.zeros(3)})
    assert compare(some, some).largest == 0
    assert compare(Outcome([2.0, 1.1], [1.0, 1.0], some.weights), some).loss == pytest.approx(0.1)
    assert compare(Outcome([2.0, 1.0], [1.0, float("nan")], some.weights), some).norm == float("inf")
    assert compare(Outcome(some.losses, some.norms, {"a": torch.tensor([0, 0, float("nan")])}), some).weight == float("inf")
    assert compare(Outcome(some.losses, some.norms, some.weights, drift=0.5), some).weight == 0.5


# ---- links


def test_links(worlds):
    findings = {finding.name: finding for finding in links.check_links(worlds(2).run, 2)}
    assert list(findings) == ["all-reduce", "all-gather", "send and receive"]
    assert {finding.state for finding in findings.values()} == {"ok"}
    assert "16 MiB" in findings["all-reduce"].text
    assert "(0->1)" in findings["send and receive"].text


def test_bus_bandwidth():
    """A ring of n sends (n - 1) / n of the tensor a rank to reduce, and again to spread the result."""
    assert links.bus_bytes("all-reduce", 800, 4) == 1200
    assert links.bus_bytes("all-gather", 800, 4) == 600
    assert links.bus_bytes("2->3", 800, 4) == 800


# ---- processes


def test_ranks_answer_in_order():
    with Processes(2, cuda=False) as processes:
        assert processes.run(cases.add, 2, 3) == [(0, 2, 5), (1, 2, 5)]
        with pytest.raises(RanksError, match=r"^rank 1 raised ZeroDivisionError: a mistake\n.*raise_on"):
            processes.run(cases.raise_on, 1)
        with pytest.raises(RanksError, match=r"^rank 0 ended with exit code 7\n(.*\n)*.*last words"):
            processes.run(cases.die_on, 0)
        assert processes.run(cases.add, 1, 1) == [(0, 2, 2), (1, 2, 2)]
        pids = [process.pid for process, _ in processes.ranks]
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_rank_that_hangs_is_named_with_its_place():
    with Processes(2, cuda=False, timeout_seconds=8) as processes:
        processes.run(cases.add, 1, 1)
        with pytest.raises(RanksError) as error:
            processes.run(cases.sleep_on, 1)
        assert not processes.ranks
    first, second = str(error.value).splitlines()[:2]
    assert first == "rank 1 does not answer"
    assert "sleep_on" in second
    assert "rank 0 raised RuntimeError" in str(error.value)


def test_a_failing_world_is_wrong():
    def run(function, *args):
        if function is links.measure:
            raise RanksError("rank 1 does not answer")
        return [Outcome()]

    findings = check_in_processes(run, 3, {"links": links.check_links})
    assert [(f.name, f.state, f.text) for f in findings] == [("links", "WRONG", "rank 1 does not answer")]


# ---- the command


def test_the_whole_command(tmp_path):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", "from megacode.cli import main; main()", "doctor", "--processes", "2"]
    out = tmp_path / "doctor.json"
    done = subprocess.run(
        [*command, "--json", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    sections = json.loads(out.read_text())["sections"]
    assert list(sections) == [
        "versions",
        "kernels",
        "self-tests in one process",
        "self-tests on 2 CPU processes, gloo, against one process",
    ]
    last = [finding["name"] for finding in sections["self-tests on 2 CPU processes, gloo, against one process"]]
    assert last[:3] == ["TP1 x PP2 x DP1", "TP2 x PP1 x DP1", "TP1 x PP1 x DP2"]
    assert max(map(len, done.stdout.splitlines())) <= 100
