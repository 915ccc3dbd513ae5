"""The benchmark of the pipeline runs the real executor; what it measures can't be better than the theory."""

import json
import subprocess
import sys

import pytest

from megacode.tools.bench.pipeline import Case, Row, busy_seconds, cases_of, table

SECONDS = 240
"""Long after the benchmark's own limit for an answer: a hang ends there."""


def test_it_measures_each_case_and_none_beats_the_formula():
    command = [sys.executable, "-m", "megacode.tools.bench.pipeline", "--pipeline", "2", "--steps", "1", "--json", "-"]
    done = subprocess.run([*command, "--forward-ms", "1"], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [Case(**row["case"]) for row in rows] == cases_of(2)
    for row in rows:
        middle, low, high = row["measured"]
        assert 0 < low == middle == high < row["ideal"]  # a sleep is never shorter than asked for


def test_the_ideal_is_one_less_the_bubble():
    assert Case(4, 1, 8).ideal == pytest.approx(8 / 11)
    assert Case(4, 2, 8).ideal == pytest.approx(16 / 19)
    assert [(case.virtual_stages, case.num_micro_batches) for case in cases_of(8)] == [
        (1, 4), (1, 8), (1, 16), (2, 8), (2, 16),
    ]  # fmt: skip


def test_chunks_share_a_micro_batchs_time():
    assert busy_seconds(Case(4, 1, 8), 0.02) == busy_seconds(Case(4, 2, 8), 0.02) == pytest.approx(0.48)


def test_a_row_compares_the_median_with_the_ideal():
    (line,) = table([Row(Case(4, 1, 8), 0.8, (0.6, 0.5, 0.7))]).splitlines()[2:]
    assert line == "| 4 | 1 | 8 | 80.0% | 60.0% (50.0%, 70.0%) | 0.750 |"
