"""What a run tells: files, console, trackers, all from a thread; a tracker's failure is not the run's."""

import io
import json
import re
import sys
import threading

import pytest
import rich.console
from support.training import recipe

from megacode.errors import UserError
from megacode.train.console import Console
from megacode.train.journal import Journal
from megacode.train.metrics import count_figures, split_losses, validation_figures
from megacode.train.trackers import check_trackers, logged_in, open_trackers

LINE = {
    "step": 3, "tokens": 96, "loss": 4.5, "loss_plain": 4.5, "loss_infilled": None, "loss_by_source": {"code": 4.5},
    "labels_by_source": {"code": 30}, "infilled_share": 0.0, "grad_norm": 1.25, "learning_rate": 1e-3, "skipped": False,
    "step_seconds": 0.5, "tokens_per_second": 64.0, "mfu": None, "memory_bytes": 2**30,
}  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def journal(run, step=0, trackers=(), console=None):
    return Journal(run, step, console or Console(step, 10), trackers)


def test_lines_are_written_in_order(tmp_path, capsys):
    book = journal(tmp_path)
    book.metrics({**LINE, "step": 1})
    book.event("checkpoint", 1, "step 1: checkpoint in x", folder="x")
    book.metrics({"step": 1, "validation_loss": 4.25, "validation_tokens": 7})
    book.close()
    book.close()
    assert lines(tmp_path / "metrics.jsonl") == [
        {**LINE, "step": 1},
        {"step": 1, "validation_loss": 4.25, "validation_tokens": 7},
    ]
    (event,) = lines(tmp_path / "events.jsonl")
    assert (event["event"], event["step"], event["folder"]) == ("checkpoint", 1, "x")
    assert event["unix_time"] > 1e9
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("step  1/10  loss 4.5000  norm 1.250  lr 1.00e-03  64 tokens/s  1.00 GiB  0:0")
    assert output[1:] == ["step 1: checkpoint in x", "step  1/10  validation loss 4.2500"]


def test_what_is_not_finite_becomes_null(tmp_path, capsys):
    book = journal(tmp_path)
    book.metrics({**LINE, "loss": float("nan"), "loss_by_source": {"code": float("inf")}, "skipped": True})
    book.close()
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["loss"] is None
    assert line["loss_by_source"] == {"code": None}
    assert "loss not finite" in capsys.readouterr().out


def test_lines_of_steps_that_are_done_again_go(tmp_path):
    book = journal(tmp_path)
    for step in (1, 2, 3):
        book.metrics({**LINE, "step": step})
    book.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    book = journal(tmp_path, step=2)
    book.metrics({**LINE, "step": 3, "loss": 1.0})
    book.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "metrics.jsonl")] == [
        (1, 4.5),
        (2, 4.5),
        (3, 1.0),
    ]


class Broken:
    def log(self, values):
        raise ConnectionError("no server")

    def close(self):
        raise ConnectionError("no server")


class Kept:
    def __init__(self):
        self.lines, self.threads = [], set()

    def log(self, values):
        self.lines.append(values)
        self.threads.add(threading.current_thread())

    def close(self):
        self.lines.append("closed")


def test_a_tracker_that_fails_is_dropped_and_told(tmp_path, capsys):
    kept = Kept()
    book = journal(tmp_path, trackers=[Broken(), kept])
    book.metrics(LINE)
    book.metrics({**LINE, "step": 4})
    book.close()
    assert [line["step"] for line in kept.lines[:2]] == [3, 4]
    assert kept.lines[2] == "closed"
    assert kept.threads.isdisjoint({threading.main_thread()})
    assert capsys.readouterr().err == "Broken failed and is dropped: ConnectionError: no server\n"
    assert len(lines(tmp_path / "metrics.jsonl")) == 2


def test_a_file_that_cannot_be_written_ends_the_run(tmp_path):
    book = journal(tmp_path)
    book._files["metrics"].close()
    book._files["metrics"] = open("/dev/full", "w")  # noqa: SIM115  the journal holds it, as it does its own files
    book.metrics(LINE)
    book.close()
    with pytest.raises(UserError, match="No space left on device; make room"):
        book.metrics(LINE)


def test_a_terminal_gets_one_live_line(tmp_path):
    screen = io.StringIO()
    console = Console(0, 10, rich.console.Console(file=screen, force_terminal=True, width=160))
    for step in range(1, 5):
        console.show("metrics", {**LINE, "step": step, "mfu": 0.41})
    console.show("events", {"text": "step 4: checkpoint in [red]x"})
    console.close()
    text = screen.getvalue()
    assert "4/10" in text
    assert "MFU 41.0%" in text
    assert "checkpoint in [red]x" in text  # not taken as markup
    assert text.count("\x1b[2K") >= 3  # the line is drawn over


def test_losses_are_told_apart():
    split = split_losses([2.0, 9.0, 4.0, 0.0], [2, 3, 4, 0], ("code", "text"))
    assert split["loss"] == pytest.approx(15 / 9)
    assert split["loss_plain"] == pytest.approx(6 / 6)
    assert split["loss_infilled"] == pytest.approx(9 / 3)
    assert split["loss_by_source"] == {"code": pytest.approx(11 / 5), "text": pytest.approx(1.0)}
    assert split["labels_by_source"] == {"code": 5, "text": 4}
    assert split["infilled_share"] == pytest.approx(3 / 9)
    assert split_losses([1.0, 0.0], [2, 0], ("code",))["loss_infilled"] is None


def test_the_share_of_infilling_documents():
    documents = {"uncut": 8, "infilled": 6, "irreversible": 2, "unfitting": 0, "spanned": 0}
    assert count_figures(documents) == {"documents": documents, "infilled_documents": 0.75}
    assert count_figures(dict.fromkeys(documents, 0))["infilled_documents"] is None


def test_a_validation_without_labels(tmp_path, capsys):
    assert validation_figures(6.0, 4) == {"validation_loss": 1.5, "validation_tokens": 4}
    book = journal(tmp_path)
    book.metrics({"step": 4, **validation_figures(0.0, 0)})
    book.close()
    book.check()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 4, "validation_loss": None, "validation_tokens": 0}]
    assert "validation loss of no token" in capsys.readouterr().out


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logging\.wandb is asked for and wandb is not installed"):
        check_trackers(recipe(logging={"wandb": "project"}))
    with pytest.raises(UserError, match=r"logging\.tensorboard"):
        check_trackers(recipe(logging={"tensorboard": True}))
    check_trackers(recipe())


def test_wandb_is_offline_unless_somebody_is_logged_in(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert logged_in()


def test_trackers_get_the_figures_and_wandb_keeps_its_id(monkeypatch, tmp_path):
    """Real packages, offline; a run that goes on is the same run for them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    config = recipe(run=str(tmp_path / "run"), logging={"wandb": "project", "tensorboard": True})
    (tmp_path / "run").mkdir()
    for first in (1, 3):
        trackers = open_trackers(config, first - 1, {"world_size": 4})
        book = journal(tmp_path / "run", step=first - 1, trackers=trackers)
        for step in (first, first + 1):
            book.metrics({**LINE, "step": step, "loss": float(step)})
        book.close()
        monkeypatch.delenv("WANDB_MODE", raising=False)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(n, float(n)) for n in (1, 2, 3, 4)]
    assert "loss_by_source/code" in events.Tags()["scalars"]
    identity = (tmp_path / "run" / "wandb" / "id").read_text()
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert folders
    # Two folders of one second get a number behind the id.
    assert all(re.fullmatch(rf"offline-run-\d+_\d+-{identity}(-\d+)?", folder.name) for folder in folders)
    logged = b"".join(file.read_bytes() for folder in folders for file in folder.glob("*.wandb"))
    for word in (b"tokens_per_second", b"world_size", b"rope_theta"):
        assert word in logged


class Gone:
    """A console whose terminal was closed."""

    def show(self, kind, values):
        raise BrokenPipeError("nobody reads")

    def close(self):
        raise BrokenPipeError("nobody reads")


def test_a_console_that_is_gone_does_not_stop_the_files(tmp_path):
    kept = Kept()
    book = journal(tmp_path, trackers=[kept], console=Gone())
    book.metrics(LINE)
    book.metrics({**LINE, "step": 4})
    book.close()
    book.check()
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    assert kept.lines[-1] == "closed"


def test_damaged_lines_go(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"other": 2}\n{"step": 2}\n')
    journal(tmp_path, step=2).close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
