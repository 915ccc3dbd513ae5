"""The doctor's checks on several processes: right here, and wrong where something is."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import doctor as cases
from support import training
from support.doctor import without

from megacode.doctor import layouts, links
from megacode.doctor.outcome import Outcome, compare
from megacode.doctor.probe import one_process, reference, train
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
    expected = reference(config, layouts.STEPS)
    ranks = worlds(4).run(without, "mark_norm_owner", train, config, layouts.STEPS)
    assert layouts.judge("clipping", ranks, expected, "").state == "WRONG"
    assert compare(ranks, expected).weight > 100 * layouts.TOLERANCE
    ranks[0].norms = expected.norms
    assert layouts.judge("clipping", ranks, expected, "").state == "WRONG"
    unclipped = reference(layouts.recipe(4, 2, 2, optimizer={**layouts.CLIPPED, "clip": 0.0}), layouts.STEPS)
    assert compare([unclipped], expected).weight > 100 * layouts.TOLERANCE


def test_masters_in_bf16_are_found():
    config = layouts.recipe(4, 2, 2, precision="bf16", optimizer=layouts.SMALL_STEPS)
    expected = reference(config, 1)
    assert layouts.judge_masters(config, [expected], expected).state == "ok"
    start = {name: layouts.initial(config, name, expected.parts[name]) for name in expected.weights}
    stuck = {name: (weight.bfloat16() != start[name].bfloat16()) for name, weight in expected.weights.items()}
    moved = {name: torch.where(stuck[name], weight, start[name]) for name, weight in expected.weights.items()}
    in_bf16 = dataclasses.replace(expected, weights=moved)
    assert layouts.judge_masters(config, [in_bf16], expected).state == "WRONG"
    far = dataclasses.replace(expected, losses=[1.01 * expected.losses[0]])
    assert layouts.judge_masters(config, [far], expected).state == "WRONG"


class TestSamples:
    """The samples of the other tests."""

    __test__ = False

    def __init__(self, config):
        self.config = config

    def micro_batch(self, numbers):
        step, first = divmod(numbers[0], self.config.batch.global_samples)
        drawn = training.samples(self.config, step)
        return training.micro_batch(self.config, *(values[first : first + len(numbers)] for values in drawn))


def test_the_reference_is_a_training():
    """Against the reference of the other tests, which shares neither optimizer groups nor samples' code with it."""
    config = layouts.recipe(4, 2, 2, optimizer={"learning_rate": 1e-2, "clip": 0.5}, data={"train": "unused"})
    config = config.model_copy(update={"seed": training.SEED})
    actual = one_process(config, TestSamples(config), 3)
    expected = training.reference(config, 3, fused=True)  # as the doctor's
    off = compare([actual], Outcome(expected.losses, expected.norms, expected.gradients, expected.weights))
    assert max(off.loss, off.worst[1]) < 1e-6
    assert max(off.norm, off.weight) < 1e-5  # that one's norm is fp32's
    start = training.initialise(training.Llama(config.model), training.SEED).state_dict()
    ways = [expected.weights[name] - weight for name, weight in start.items()]
    assert actual.moved == pytest.approx(float(torch.cat([way.flatten() for way in ways]).norm()), rel=1e-3)


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
