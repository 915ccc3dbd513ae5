"""`megacode schedule`: what is drawn is the timeline, in any terminal; what is said is right; mistakes are one line."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.schedules import LARGE, SMALL
from typer.testing import CliRunner

from megacode import cli
from megacode.parallel.timeline import simulate
from megacode.tools.schedule_text import CUT, IDLE, schedule_text

DOCS = Path(__file__).parents[2] / "docs"
SVG = "{http://www.w3.org/2000/svg}"
BACKWARDS = st.sampled_from([0.5, 1.0, 1.5, 2.0, 2.7, 3.0])


def run(*arguments, columns=80):
    return CliRunner().invoke(cli.app, ["schedule", *map(str, arguments)], env={"COLUMNS": str(columns)})


def rows(lines, pipeline):
    """The drawing of each rank, without its title."""
    return [re.fullmatch(r"rank (\d+) +(.*)", line)[2] for line in lines[:pipeline]]


@settings(max_examples=60)
@given(st.sampled_from(SMALL), BACKWARDS)
def test_each_operation_is_drawn_by_name_where_it_is_in_time(case, backward):
    pipeline, _, virtual = case
    timeline = simulate(*case, backward=backward)
    drawn = rows(schedule_text(timeline, virtual, 10_000), pipeline)
    columns = round(len(drawn[0]) / timeline.duration)
    for rank, row in zip(timeline.ranks, drawn, strict=True):
        assert len(row) == len(drawn[0])
        found = list(re.finditer(r"(F|B)(\d+)([a-z]?)([-=]*)", row))
        assert len(found) == len(rank)
        assert row.count(IDLE) == len(row) - sum(len(match[0]) for match in found)
        for timed, match in zip(rank, found, strict=True):
            operation = timed.operation
            chunk = chr(ord("a") + operation.chunk) if virtual > 1 else ""
            assert match.group(1, 2, 3) == (operation.kind[0].upper(), str(operation.micro_batch), chunk)
            assert set(match[4]) <= {"-" if operation.kind == "forward" else "="}
            assert abs(match.start() - timed.start * columns) <= 0.5 + 1e-6
            assert abs(match.end() - timed.stop * columns) <= 0.5 + 1e-6


@settings(max_examples=60)
@given(st.sampled_from(SMALL) | LARGE, BACKWARDS, st.integers(40, 200))
def test_a_drawing_is_no_wider_than_the_terminal(case, backward, width):
    """Where it is cut, it is cut in every row, and what is drawn is the drawing's beginning and end."""
    timeline = simulate(*case, backward=backward)
    lines = schedule_text(timeline, case[2], width)
    assert max(map(len, lines)) <= width
    cut = [CUT in line for line in lines[: case[0]]]
    assert all(cut) or not any(cut)
    signs = " ".join(lines[case[0] + 1 :])
    assert ("~~" in signs) == ("left out" in signs) == cut[0]
    axis = lines[case[0]].split()
    assert float(axis[0].replace(",", "")) == 0
    assert float(axis[-1].replace(",", "")) == pytest.approx(timeline.duration, abs=0.051)
    assert len(axis) == (4 if cut[0] else 2)
    for row in rows(lines, case[0]):
        head, _, tail = row.partition(CUT)
        assert re.fullmatch(r"[.FB0-9a-z=-]+", head + tail)


def test_a_cut_drawing_is_the_ends_of_the_whole_one():
    timeline = simulate(4, 30)
    whole, cut = (rows(schedule_text(timeline, 1, width), 4) for width in (10_000, 120))
    for long, row in zip(whole, cut, strict=True):
        head, tail = row.split(CUT)
        assert len(head) == len(tail) > 50
        # an operation at the cut has its letter alone, or no room for it
        assert long.startswith(re.sub(r"[FB]?[-=]*$", "", head))
        assert long.endswith(tail.lstrip("-="))


def test_letters_alone_where_numbers_would_hide_the_first_backward():
    timeline = simulate(4, 8, 2)
    narrow, wide = (rows(schedule_text(timeline, 2, width), 4)[0] for width in (80, 200))
    assert narrow.startswith("FFFFFFFFFFF...B=FB=.")
    assert CUT not in narrow
    assert wide.startswith("F0aF1aF2aF3aF0bF1bF2bF3bF4aF5aF6a.........B0b===F7aB1b===")


def test_the_docs_show_what_is_drawn(tmp_path):
    text = (DOCS / "schedule.md").read_text(encoding="utf-8")
    assert run("--pp", 4, "--microbatches", 8).output in text
    drawing = tmp_path / "schedule.svg"
    assert run("--pp", 4, "--microbatches", 8, "--virtual", 2, "--svg", drawing).exit_code == 0
    assert drawing.read_text(encoding="utf-8") == (DOCS / "schedule.svg").read_text(encoding="utf-8")


def test_the_file_of_a_drawing_needs_nothing_else():
    text = (DOCS / "schedule.svg").read_text(encoding="utf-8")
    picture = ET.fromstring(text)
    assert picture.tag == f"{SVG}svg"
    assert len(text) < 20_000
    for word in ("var(", "url(", "href", "@import", "<script"):
        assert word not in text
    ground = picture.find(f"{SVG}rect")
    assert (ground.get("width"), ground.get("height"), ground.get("fill")) == ("100%", "100%", "#fff")
    (style,) = picture.iter(f"{SVG}style")
    styled = set(re.findall(r"\.([a-z]\w*)", style.text))
    drawn = {name for element in picture.iter() for name in element.get("class", "").split()}
    assert {"forward", "backward", "idle", "inside", "title", "o1"} <= styled & drawn


def test_figures_by_hand():
    plain = run("--pp", 4, "--microbatches", 8).output
    assert "bubble 27.27% of the step; (p - 1) / (m + p - 1) = 3/11 = 27.27%" in plain
    assert "rank 0: 4 (4)   rank 1: 3 (3)   rank 2: 2 (2)   rank 3: 1 (1)" in plain
    few = run("--pp", 4, "--microbatches", 2).output
    assert "bubble 60.00% of the step; (p - 1) / (m + p - 1) = 3/5 = 60.00%" in few
    assert "rank 0: 2 (4)   rank 1: 2 (3)   rank 2: 2 (2)   rank 3: 1 (1)" in few
    interleaved = run("--pp", 4, "--microbatches", 8, "--virtual", 2).output
    assert "bubble 15.79% of the step; (p - 1) / (v m + p - 1) = 3/19 = 15.79%" in interleaved
    assert "each of one chunk, 1/2 of a rank's layers" in interleaved
    assert "rank 0: 11 (11)" in interleaved


def test_json_has_every_operation():
    found = json.loads(run("--pp", 4, "--microbatches", 8, "--virtual", 2, "--backward", 1.5, "--json", "-").stdout)
    timeline = simulate(4, 8, 2, 1.5)
    assert found["ranks"] == [
        [
            {
                "kind": t.operation.kind, "chunk": t.operation.chunk, "micro_batch": t.operation.micro_batch,
                "start": t.start, "stop": t.stop,
            }
            for t in rank
        ]
        for rank in timeline.ranks
    ]  # fmt: skip
    assert (found["pipeline"], found["num_micro_batches"], found["virtual_stages"]) == (4, 8, 2)
    assert found["duration"] == timeline.duration
    assert found["bubble_share"] == pytest.approx(3 / 19) == found["bubble_formula"]
    assert found["in_flight"] == found["in_flight_limit"] == [11, 9, 7, 5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pp", 0, "--microbatches", 8], "--pp must be 1 or more, not 0"),
        (["--pp", 4, "--microbatches", -8], "--microbatches must be 1 or more, not -8"),
        (["--pp", 4, "--microbatches", 8, "--virtual", 0], "--virtual must be 1 or more, not 0"),
        (["--pp", 4, "--microbatches", 6, "--virtual", 2], "take 4 or 8, or leave --virtual out"),
        (["--pp", 4, "--microbatches", 3, "--virtual", 2], "take 4, or leave --virtual out"),
        (["--pp", 1, "--microbatches", 3, "--virtual", 2], "needs --pp above 1"),
        (["--pp", 4, "--microbatches", 8, "--backward", 0], "--backward must be from 0.1 to 10"),
        (["--pp", 4, "--microbatches", 8, "--backward", "nan"], "--backward must be from 0.1 to 10"),
        (["--pp", 4, "--microbatches", 10**9], "take fewer --microbatches"),
        (["--pp", 4, "--microbatches", 8, "--svg", "no/such/folder.svg"], "cannot write no/such/folder.svg: No such"),
        (["--pp", 4, "--microbatches", 8, "--svg", "."], "name another file with --svg"),
    ],
)
def test_a_mistake_is_one_line_with_the_mend(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["megacode", "schedule", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert words in err


def test_it_imports_no_torch():
    code = (
        "import sys\nfrom megacode.cli import app\n"
        "try:\n    app(['schedule', '--pp', '4', '--microbatches', '8'])\n"
        "finally:\n    assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "bubble" in done.stdout
