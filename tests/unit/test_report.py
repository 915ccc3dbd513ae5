"""`megacode report`: what it reads of a run folder, however the run ended, and what the page says."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from support.runs import write_run
from support.training import recipe

from megacode.errors import UserError
from megacode.plan.layout import fit
from megacode.tools.report import report
from megacode.tools.report.curves import Curves
from megacode.tools.report.page import make_page
from megacode.tools.report.run import layout_of, read_run
from megacode.train.metrics import start_facts

EVIL = "</script></pre><script>document.title = 'taken'</script>"
TWELVE = [f"source {n}" for n in range(12)]


def page_of(folder):
    return make_page(read_run(folder))


class Outline(HTMLParser):
    """Elements by name, and the text of the page."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        self.open.append(name)

    def handle_endtag(self, name):
        while self.open and self.open.pop() != name:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    def all(self, name, class_=None):
        return [a for n, a in self.elements if n == name and (class_ is None or class_ in a.get("class", "").split())]


def test_a_finished_run(tmp_path):
    folder = write_run(tmp_path / "mine", steps=120, sources=["python", "c"], virtual_stages=2, restarts=[60])
    outline = Outline(page_of(folder))
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    for words in (
        "mine", "Finished", "100.0% of 120", f"{last['tokens']:,}", f"{last['loss']:.4f}", "2 starts",
        "58.58%", "41.42%",  # shares 1 and 1/sqrt(2) of two sources
        "embedding, layers 0\N{EN DASH}3, 16\N{EN DASH}19", "4 pipeline \N{MULTIPLICATION SIGN} 2 data",
        "PP4 DP2 TP2 V2", "h0 = node000 (8), h1 = node001 (8)", "NVIDIA H100", "torch 2.11.0", "attention: flash-attn",
        "launchers/train.py recipes/seven.yaml", "step_00000060", "step_00000120", "50.66 GiB",
        "global_samples: 512", "each point", "56 GiB on rank 6, 50 GiB on rank 0",
    ):  # fmt: skip
        assert words.lower() in outline.text.lower(), words
    # 3 of losses, 2 of the optimizer, 4 of throughput, phases, infilling, layout, schedule
    assert len(outline.all("svg", "chart")) == 13
    assert not outline.all("ul", "notices")
    assert "not recorded" not in outline.text


def test_the_bubble_is_that_of_the_runs_schedule(tmp_path):
    folder = write_run(tmp_path / "run", steps=2, layout=(8, 1, 1), micro_samples=16)
    text = Outline(page_of(folder)).text
    assert "1F1B of 32 micro-batches on 8 pipeline ranks" in text
    assert f"{7 / (32 + 7):.1%}" in text


def test_context_ranks_and_what_goes_with_them(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=2, context=2))
    assert layout_of(run.last_start).context == 2
    text = Outline(make_page(run)).text
    times = " \N{MULTIPLICATION SIGN} "
    for words in ("PP4 DP2 CP2 TP2 SP, recompute full", f"2 data{times}2 context{times}2 tensor", "recomputation full"):
        assert words in text, words


def test_what_the_trainer_writes_of_a_layout_is_read_back():
    config = recipe(parallel={"context": 2, "tensor": 2, "sequence": True, "recompute": "selective"})
    layout = fit(config, 8)
    facts = start_facts(config, layout, torch.device("cpu"), ["here"] * 8, 0, None, {})
    start = json.loads(json.dumps(facts))
    assert layout_of(start) == layout
    assert (start["layout"]["sequence"], start["layout"]["recompute"]) == (True, "selective")


def test_a_run_from_before_context_ranks(tmp_path):
    """Its starts.jsonl names none, nor does its recipe."""
    run = read_run(write_run(tmp_path / "run", steps=2))
    assert not {"context", "sequence", "recompute"} & set(run.last_start["layout"])
    assert layout_of(run.last_start).context == 1
    text = Outline(make_page(run)).text
    assert "PP4 DP2 TP2" in text
    assert "CP1" not in text
    assert "context" not in text.split("recipe.yaml")[0]


def test_a_failed_run_with_steps_left_out(tmp_path):
    folder = write_run(
        tmp_path / "run",
        steps=90,
        planned=400,
        outcome="failed",
        message="FloatingPointError: it grew",
        spoiled=[40, 90],
    )
    outline = Outline(page_of(folder))
    for words in ("Failed", "rank 3: FloatingPointError: it grew", "22.5% of 400", "steps without a finite loss: 2"):
        assert words in outline.text
    assert "skip 2, failure 1." in outline.text
    assert f"{read_run(folder).metrics.last_known['loss']:.4f}" in outline.text


STALL = """\
who     host  process  stands in                            waits for  since
rank 0  a     runs     receive from rank 2 in start of run  rank 2     300 s
rank 2  b     runs     reading data of step 7               -          300 s"""


def test_a_stall_shows_who_waited_for_whom(tmp_path):
    said = "stalled for 300 s: rank 2 (host b, process 4711) stands in reading data of step 7; rank 0 waits for it"
    folder = write_run(tmp_path / "run", steps=6, outcome="failed", message=said)
    slow = "step 5: rank 2 (host b, process 4711) is slow: 3 s a step without communication"
    events = [
        {"unix_time": 1.75e9, "step": 5, "event": "straggler", "text": slow, "host": "b", "rank": 2, "ratio": 1.5},
        {"unix_time": 1.75e9, "step": 6, "event": "stall", "text": said, "ranks": [2], "table": STALL.splitlines()},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    page = page_of(folder)
    outline = Outline(page)
    assert "straggler 1, stall 1." in outline.text
    assert slow in outline.text
    assert outline.text.count(said) == 2  # the outcome and the event
    assert "ratio" not in outline.text.split("recipe.yaml")[0]
    assert f'<pre class="columns">{STALL}</pre>' in page  # its columns as they are
    assert "Who waited for whom, stall of 2025-06-15" in outline.text
    for name in ("straggler", "stall"):
        assert outline.all("span", f"event-{name}")
        assert f".event-{name}" in page


def test_one_step(tmp_path):
    outline = Outline(page_of(write_run(tmp_path / "run", steps=1, planned=2, phases=False)))
    assert "Phases of a step: not recorded (logging.phases)." in outline.text
    assert outline.all("circle", "dot")


def test_only_metrics_are_there(tmp_path):
    folder = write_run(tmp_path / "run", steps=5)
    for name in ("recipe.yaml", "status.json", "starts.jsonl", "events.jsonl"):
        (folder / name).unlink()
    outline = Outline(page_of(folder))
    for name in ("recipe.yaml", "status.json", "starts.jsonl", "events.jsonl"):
        assert f"{name} is missing" in outline.text
    assert len(outline.all("svg", "chart")) == 11
    assert "Unknown" in outline.text


def test_lines_that_an_older_run_wrote(tmp_path):
    """Figures that are not there are said to be so, and what is there is drawn."""
    folder = tmp_path / "run"
    folder.mkdir()
    line = {"step": 1, "tokens": 10, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({**line, "step": n}) + "\n" for n in (1, 2, 3)))
    outline = Outline(page_of(folder))
    assert len(outline.all("svg", "chart")) == 3
    for name in ("Model FLOPs utilization", "Labels by source", "Peak memory of rank 0"):
        assert f"{name}: not recorded." in outline.text


def test_a_killed_run_leaves_half_a_line(tmp_path):
    folder = write_run(tmp_path / "run", steps=20, outcome="running")
    for name in ("metrics.jsonl", "events.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 21, "lo')
    (folder / "checkpoints" / "step_00000010.partial").mkdir(parents=True)
    run = read_run(folder)
    assert run.notices == [
        f"{name}: the last line is half written and left out" for name in ("metrics.jsonl", "events.jsonl")
    ]
    assert run.metrics.num_steps == 20
    text = Outline(make_page(run)).text
    assert "a run that was killed may still say so" in text
    assert "step_00000010.partial" in text
    assert "unfinished" in text


def test_damaged_files_are_noticed(tmp_path):
    folder = write_run(tmp_path / "run", steps=4)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\nnonsense\n[1]\n{"step": 2, "loss": NaN}\n')
    (folder / "status.json").write_text("{")
    (folder / "recipe.yaml").write_text("a: [")
    (folder / "checkpoints" / "step_00000004" / "manifest.json").write_text("{")
    run = read_run(folder)
    assert run.notices == [
        "metrics.jsonl: 2 damaged lines are left out, the first is line 2",
        "status.json is damaged: the outcome is not known",
        "recipe.yaml is not YAML: the planned steps are not known",
    ]
    assert run.metrics.num_without_loss == 1
    assert "manifest.json is damaged" in make_page(run)


@pytest.mark.parametrize(
    "change",
    [{"pipeline": 0}, {"context": 0}, {"context": "x"},
     {"stages": [[0, 1]]}, {"stages": [[0, 0]] * 4}, {"tensor": None}, {"stages": None},
     {"virtual_stages": "x"}],
)  # fmt: skip
def test_a_layout_that_no_run_can_have_is_not_known(tmp_path, change):
    start = read_run(write_run(tmp_path / "run", steps=1)).last_start
    assert layout_of(start) is not None
    assert layout_of({**start, "layout": {**start["layout"], **change}}) is None


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"has no metrics\.jsonl and no status\.json; name a run folder"):
        report(tmp_path)


def test_a_run_that_stalled_before_its_first_step(tmp_path):
    folder = write_run(tmp_path / "run", steps=1, outcome="failed", message="stalled for 300 s: rank 1 is stopped")
    for name in ("metrics.jsonl", "starts.jsonl"):
        (folder / name).unlink()
    text = Outline(page_of(folder)).text
    assert "metrics.jsonl is missing: there are no curves" in text
    assert "stalled for 300 s: rank 1 is stopped" in text


def test_an_output_that_can_not_be_written(tmp_path):
    folder = write_run(tmp_path / "run", steps=1)
    with pytest.raises(UserError, match="name another file with --output"):
        report(folder, tmp_path / "nowhere" / "report.html")


def test_text_of_the_run_is_never_markup(tmp_path):
    folder = write_run(
        tmp_path / "<script>evil", steps=3, sources=[EVIL, "b"], outcome="failed", message=EVIL,
        settings={"tokenizer": {"path": EVIL}},
    )  # fmt: skip
    start = json.loads((folder / "starts.jsonl").read_text())
    start |= {"device": EVIL, "hosts": {EVIL: 16}, "command": [EVIL], "versions": {EVIL: EVIL}, "checkpoint": EVIL}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    event = {"unix_time": EVIL, "step": EVIL, "event": EVIL, "text": EVIL}
    stall = {**event, "event": "stall", "table": [EVIL, {EVIL: EVIL}]}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n" + json.dumps(stall) + "\n")
    page = page_of(folder)
    scripts = Outline(page).all("script")
    assert len([script for script in scripts if script.get("type") is None]) == 1
    assert "<script>document.title" not in page
    assert page.count("</script>") == len(scripts)


def test_the_page_names_no_other_place(tmp_path):
    page = page_of(write_run(tmp_path / "run", steps=30))
    assert not re.findall(r"(?:src|href)=\"(?!#)", page)
    assert not re.findall(r"@import|url\(", page)
    assert set(re.findall(r"https?://[^\"\s]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page


def test_a_long_run_is_binned_and_the_page_stays_small(tmp_path):
    folder = write_run(tmp_path / "run", steps=5000, sources=TWELVE, layout=(16, 8, 8), micro_samples=1)
    page = page_of(folder)
    assert "5,000 steps are drawn in bins of 8" in page
    assert len(page) < 3e6


@pytest.mark.parametrize("steps", [1, 10, 11, 1000])
def test_bins_hold_every_value_once(steps):
    curves = Curves(most=10)
    values = [float((step * 37) % 101) for step in range(1, steps + 1)]
    for step, value in enumerate(values, 1):
        curves.add(step, {("a",): value, ("b",): None if step % 2 else value})
    points = curves.points(("a",))
    assert min(5, steps) <= len(points) <= 10
    for number, point in enumerate(points):
        inside = values[number * curves.width : (number + 1) * curves.width]
        assert point.mean == pytest.approx(sum(inside) / len(inside))
        assert (point.low, point.high) == (min(inside), max(inside))
        assert point.x == number * curves.width + (len(inside) + 1) / 2
    assert curves.mean(("a",)) == pytest.approx(sum(values) / steps)
    stacks = curves.stacks([("a",)], most=3)
    assert len(stacks) <= 3
    assert stacks[0][0] == 1


def test_the_command_writes_the_page_and_needs_no_torch(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    code = (
        "import sys; from megacode.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, "report", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stderr == ""
    assert done.stdout.strip() == str(folder / "report.html")
    other = tmp_path / "other.html"
    subprocess.run([*command, "--output", str(other)], capture_output=True, check=True, timeout=300)
    assert other.read_text() == (folder / "report.html").read_text()
