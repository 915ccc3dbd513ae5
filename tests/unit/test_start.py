"""megacode.train.start and loop: what a run may be gone on with, and the ledger."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megacode.checkpoint.reader import Progress
from megacode.errors import UserError
from megacode.train import start
from megacode.train.loop import _add_labels

SOURCES = {
    "code": {"weight": 0.85, "num_tokens": 500, "samples_per_epoch": 7, "hash": "ab"},
    "text": {"weight": 0.15, "num_tokens": 400, "samples_per_epoch": 5, "hash": "cd"},
}
PROGRESS = Progress(3, 12, 3, 1, 64, 900, "concatenate", 2, SOURCES)


def resume(monkeypatch, here, there, optimizer="adamw"):
    monkeypatch.setattr(start.store, "newest", lambda folder: "CHECKPOINT")
    monkeypatch.setattr(
        start, "open_weights", lambda recipe, path: SimpleNamespace(progress=there, optimizer=optimizer)
    )
    monkeypatch.setattr(start, "new_progress", lambda recipe, stream: here)
    start.check_run_folder(SimpleNamespace(run="RUN", checkpoint=SimpleNamespace(start_from=None)), None)


def changed(name, **values):
    return replace(PROGRESS, sources={**SOURCES, name: {**SOURCES[name], **values}})


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (replace(PROGRESS, seed=2), "seed is 2 and CHECKPOINT has 1"),
        (replace(PROGRESS, sequence_length=32), "batch.sequence_length is 32 and CHECKPOINT has 64"),
        (replace(PROGRESS, packing="best_fit"), "data.packing is best_fit and CHECKPOINT has concatenate"),
        (replace(PROGRESS, order=3), "the version of the order of samples is 3 and CHECKPOINT has 2"),
        (changed("text", weight=0.2), r"data.train \(weight of text\) is 0.2 and CHECKPOINT has 0.15"),
        (changed("code", num_tokens=501), r"data.train \(num tokens of code\) is 501 and CHECKPOINT has 500"),
        (changed("code", samples_per_epoch=8), r"\(samples per epoch of code\) is 8 and CHECKPOINT has 7"),
        (changed("code", hash="ef"), r"\(hash of code\) is ef and CHECKPOINT has ab"),
        (replace(PROGRESS, sources={"code": SOURCES["code"]}),
         r"data.train \(names of sources\) is code and CHECKPOINT has code, text"),
        (replace(PROGRESS, sources=dict(reversed(SOURCES.items()))),
         r"\(names of sources\) is text, code and CHECKPOINT has code, text"),
    ],
)  # fmt: skip
def test_another_order_of_samples_is_refused(monkeypatch, here, message):
    with pytest.raises(UserError, match=message):
        resume(monkeypatch, here, PROGRESS)


def test_the_same_order_is_gone_on_with(monkeypatch):
    resume(monkeypatch, replace(PROGRESS, step=0, next_sample=0, adam_step=0), PROGRESS)


@pytest.mark.parametrize(("optimizer", "whose"), [(None, "weights alone"), ("lion", "the states of lion")])
def test_another_optimizer_is_refused(monkeypatch, optimizer, whose):
    with pytest.raises(UserError, match=f"CHECKPOINT has {whose}, .*take its weights by checkpoint.start_from"):
        resume(monkeypatch, PROGRESS, PROGRESS, optimizer)


def test_a_checkpoint_of_the_order_before_is_refused(monkeypatch):
    with pytest.raises(UserError, match="the version of the order of samples is 2 and CHECKPOINT has 1"):
        resume(monkeypatch, PROGRESS, Progress(3, 12, 3, 1, 64, 900))


def test_the_ledger_adds_up():
    ledger = _add_labels({}, ("code", "text"), [10.0, 5.0, 3.0, 0.0])
    assert ledger == {
        "code": {"labels": 15, "infilled_labels": 5}, "text": {"labels": 3, "infilled_labels": 0},
    }  # fmt: skip
    resumed = {name: {"samples": 4, **values} for name, values in ledger.items()}
    assert _add_labels(resumed, ("code", "text"), [1.0, 2.0, 4.0, 8.0]) == {
        "code": {"labels": 18, "infilled_labels": 7}, "text": {"labels": 15, "infilled_labels": 8},
    }  # fmt: skip
