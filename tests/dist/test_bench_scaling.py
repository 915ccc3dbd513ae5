"""The benchmark of scaling trains the same in all layouts; sleeps stand where kernels would, and overlap as they do."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megacode.model.layers import PlainLayers
from megacode.model.linear import linears
from megacode.model.llama import Llama, initialise
from megacode.tools.bench.busy import KERNELS, BusyExchange, make_busy
from megacode.tools.bench.contest import check_losses, contest_recipe
from megacode.tools.bench.scaling import Answer, Case, Run, cases_of, rows_of, table

SECONDS = 240
"""Long after the benchmark's own limit for an answer: a hang ends there."""


def run(*options):
    command = [sys.executable, "-m", "megacode.tools.bench.scaling", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)


def test_it_measures_each_layout_and_none_beats_its_sleeps():
    done = run("--processes", "2", "--steps", "1", "--block-ms", "1", "--json", "-")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    cases = [*cases_of(1), *cases_of(2)]
    assert [(row["processes"], row["layout"], row["zero"]) for row in rows] == [
        (case.processes, case.layout, case.parallel["zero"]) for case in cases
    ]
    for row in rows:
        middle, low, high = row["seconds"]
        # 16 samples through 2 blocks, forward and twice as long backward; a sleep is never shorter than asked for.
        assert row["asleep"] == pytest.approx(0.096 / row["processes"])
        assert row["asleep"] < low == middle == high
        assert 0 < row["communication"] < middle
        assert row["bare_seconds"] > 0 < row["bare_core_seconds"]
    assert [row["speed_up"] for row in rows[:2]] == [1, 1]


def test_processes_that_can_not_share_the_step_are_refused():
    done = run("--processes", "3")
    assert done.returncode == 2
    assert "--processes 3: the step is shared by 2, 4 or 8" in done.stderr


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_all_layouts_share_one_step(processes):
    for case in cases_of(processes):
        batch = case.recipe.batch
        assert batch.global_samples == 16
        assert batch.global_samples // batch.micro_samples * case.model_ranks == 2 * processes


class Exchange:
    """Tells when it is started and waited for."""

    def __init__(self, events):
        self.events = events

    def _start(self, name, x):
        self.events.append(f"start {name}")

        def wait():
            self.events.append(f"wait for {name}")
            return x

        return wait

    def collect(self, x):
        return self._start("gather", x)

    def spread(self, grad):
        return self._start("sum", grad)


def test_kernels_run_while_exchanges_are_under_way():
    events = []
    busy = BusyExchange(Exchange(events), lambda: events.append("kernel"))
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    (y,) = linears((weight,), x, exchange=busy)
    assert events == ["start gather", "wait for gather", "kernel"]
    events.clear()
    y.sum().backward()
    assert events == ["start gather", "kernel", "start sum", "wait for gather", "kernel", "wait for sum"]


def test_a_block_sleeps_forward_and_twice_as_long_backward():
    sizes, slept = contest_recipe("nano", 1, {}, 1).model, []
    model = initialise(Llama(sizes, PlainLayers()), seed=1)
    make_busy(SimpleNamespace(engine=SimpleNamespace(module=model)), lambda times=1: slept.append(times))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    y = model(tokens, torch.arange(8)[None])
    assert slept == [1] * KERNELS * sizes.layers
    slept.clear()
    y.sum().backward()
    assert sum(slept) == 2 * KERNELS * sizes.layers


def test_efficiency_is_to_one_process_of_the_same_zero_stage():
    runs = []
    for processes, zero, seconds in ((1, 1, 8.0), (1, 3, 10.0), (2, 1, 5.0), (2, 3, 5.0)):
        one = Run(Case(processes, {"zero": zero}), team=None, number=0)
        # The first step is the warm-up; ranks begin one after the other.
        for length in (100.0, seconds):
            ranks = [Answer((rank, length), 0.5 + rank, 0.25, 1.0) for rank in range(processes)]
            one.answers["busy"].append(ranks)
            one.answers["bare"].append(ranks)
        runs.append(one)
    rows = rows_of(runs, block_seconds=0.03)
    assert [row.speed_up for row in rows] == [1, 1, 1.6, 2]
    assert [row.efficiency for row in rows] == [1, 1, 0.8, 1]
    assert [row.communication for row in rows] == [0.5, 0.5, 1, 1]
    assert [row.bare_core_seconds for row in rows] == [0.25, 0.25, 0.5, 0.5]
    line = table(rows).splitlines()[-1]
    assert line == "| 2 | data 2 | 3 | 5.000 (5.000, 5.000) | 2.00 | 100% | 1.440 | 1.000 | 2.560 | 5.000 | 0.500 |"


def test_other_losses_end_the_comparison():
    check_losses(1, {"one": 6.0, "two": 6.0001})
    with pytest.raises(RuntimeError, match="step 2: the loss of two is 6.001000 and that of one 6.000000"):
        check_losses(2, {"one": 6.0, "two": 6.001})
