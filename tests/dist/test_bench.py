"""The benchmark beside the peers runs, its contestants train the same, and its tables have their rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.training import recipe

from megacode.parallel.traffic import Call
from megacode.plan.communication import Exchange
from megacode.tools.bench.communication import compare
from megacode.tools.bench.contest import contest_recipe, step_batches
from megacode.tools.bench.processes import Memory, Turn
from megacode.tools.bench.train_cpu import Contestant, Row, Run, _check_losses, contestants, table

SECONDS = 300
"""Long before the contestants' own limit: a hang ends here."""


def test_all_contestants_train_the_same():
    command = [sys.executable, "-m", "megacode.tools.bench.train_cpu", "--shape", "nano", "--steps", "2", "--json", "-"]
    done = subprocess.run([*command, "--micro-batches", "2"], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    rows = answer["rows"]
    assert [row["name"] for row in rows] == [one.name for one in contestants(2)]
    for row in rows:
        assert row["losses"] == pytest.approx(rows[0]["losses"], rel=1e-5)
        assert row["losses"][2] < row["losses"][0]
        assert row["memory"]["peak"] > row["memory"]["before"] > 0
        middle, low, high = row["tokens_per_second"]
        assert 0 < low <= middle <= high
    assert set(answer["overhead_ms"]) > {"schedule alone", "ZeRO-1"}


def test_other_losses_end_the_comparison():
    recipe = contest_recipe("nano", 1, {}, 2)
    runs = [Run(one, recipe, None) for one in contestants(2)[-2:]]
    runs[0].losses, runs[1].losses = [6.0], [6.0001]
    _check_losses(runs)
    for wrong in (6.001, float("nan")):
        runs[1].losses = [wrong]
        with pytest.raises(RuntimeError, match="the loss of transformers, one process is"):
            _check_losses(runs)


def test_ranks_share_the_same_samples():
    """Two ranks together have one rank's micro-batches: the global batch does not depend on the processes."""
    two, one = contest_recipe("nano", 2, {}, 2), contest_recipe("nano", 4, {}, 1)
    shared = [step_batches(two, 3, rank, 2) for rank in range(2)]
    alone = step_batches(one, 3, 0, 1)
    for number, (tokens, labels) in enumerate(alone):
        have, labelled = shared[number % 2][number // 2]
        assert have.equal(tokens)
        assert labelled.equal(labels)
        assert tokens[:, 1:].equal(labels[:, :-1])


def test_the_ratio_is_to_the_fastest_peer():
    memory = Memory(before=2**20, peak=3 * 2**20)
    rates = {"ours": 120.0, "peer": 80.0, "fast peer": 100.0}
    rows = [Row("nano", n, 2, "peer" in n, (rate, rate, rate), memory, [1.0]) for n, rate in rates.items()]
    rows.append(Row("micro", "peer", 2, True, (500.0, 500.0, 500.0), memory, [1.0]))
    lines = table(rows).splitlines()
    assert [line.split(" | ")[4] for line in lines[2:]] == ["1.20", "0.80", "1.00", "1.00"]
    assert "3 (1)" in lines[2]


def test_counted_communication_is_printed_beside_the_formulas(tmp_path):
    path = tmp_path / "recipe.yaml"
    recipe().save(path)
    command = [sys.executable, "-m", "megacode.tools.bench.communication", str(path), "parallel.zero=3"]
    done = subprocess.run([*command, "--processes", "2", "--json", "-"], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)
    assert answer["parallel"] == {"zero": 3}
    assert len(answer["ranks"]) == len(answer["small"]) == answer["processes"] == 2
    assert {row["kind"] for row in answer["ranks"][1]} == {"all-gather", "reduce-scatter"}


def test_calls_that_no_formula_knows_are_wrong():
    planned = [Exchange("", "data", "all-gather", 2, 1, 100.0, most_calls=3, least_bytes=50.0)]
    call = Call("data", "all-gather", 25, 50)
    assert [row.right for row in compare([call, call], planned)] == [True]
    assert [row.right for row in compare([call] * 3, planned)] == [False]
    assert [row.right for row in compare([call, Call("tensor", "all-reduce", 8, 16)], planned)] == [True, False]
    assert [row.right for row in compare([], planned)] == [False]
    assert [row.right for row in compare([call, Call("world", "all-reduce", 8, 16)], planned)] == [True]
