"""megacode.train.start and loop: what a run may be gone on with, and the ledger."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.exports import write_checkpoint
from support.training import recipe

from megacode.checkpoint import origin
from megacode.checkpoint.reader import CheckpointReader, Progress
from megacode.errors import UserError
from megacode.train import start
from megacode.train.loop import _add_labels

SOURCES = {
    "code": {"weight": 0.85, "num_tokens": 500, "samples_per_epoch": 7, "hash": "ab"},
    "text": {"weight": 0.15, "num_tokens": 400, "samples_per_epoch": 5, "hash": "cd"},
}
PROGRESS = Progress(3, 12, 3, 1, 64, 900, "concatenate", 2, SOURCES)


def resume(monkeypatch, here, there, optimizer="adamw"):
    monkeypatch.setattr(start.keep, "newest", lambda folder: "CHECKPOINT")
    reader = SimpleNamespace(progress=there, optimizer=optimizer)
    monkeypatch.setattr(start, "open_weights", lambda recipe, path: reader)
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


STAGE = {"preset": "nano", "hidden": 64, "ffn": 176, "layers": 2, "init_std": 0.1}


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """The checkpoint of an earlier stage, with a base of rotary positions of 10,000."""
    return write_checkpoint(tmp_path_factory.mktemp("first"))


def second_stage(first_stage, run, start_from="", **model):
    rows = {"vocabulary": first_stage.model.vocabulary}
    return recipe(
        run=str(run),
        model={**STAGE, **rows, **model},
        tokenizer={"path": str(first_stage.tokenizer_path)},
        checkpoint={"start_from": str(first_stage.folder) if start_from == "" else start_from},
    )


def check(config, monkeypatch):
    monkeypatch.setattr(start, "new_progress", lambda recipe, stream: PROGRESS)
    start.check_run_folder(config, None)


def test_a_new_stage_may_have_another_base_of_rotary_positions(first_stage, tmp_path, monkeypatch):
    config = second_stage(first_stage, tmp_path, rope_theta=1e6, max_positions=16384)
    check(config, monkeypatch)
    assert start.describe_weights(config) == (
        f"the weights of {first_stage.folder} (its step 7), with model.rope_theta 1e+06 instead of 10000"
    )


def test_converted_weights_have_no_step(tmp_path):
    converted = write_checkpoint(tmp_path, step=0)
    assert start.describe_weights(second_stage(converted, tmp_path / "run")) == f"the weights of {converted.folder}"


def test_a_new_stage_has_the_same_model_otherwise(first_stage, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"model.layers is 3 and .*; change the one, or name another checkpoint.start"):
        check(second_stage(first_stage, tmp_path, layers=3), monkeypatch)
    with pytest.raises(UserError, match="holds no checkpoint"):
        check(second_stage(first_stage, tmp_path, start_from=str(tmp_path)), monkeypatch)


def test_a_resume_is_no_new_stage(first_stage, monkeypatch):
    """In the folder of a run that has checkpoints neither another theta nor other weights to start from pass."""
    run = first_stage.folder.parent.parent
    config = second_stage(first_stage, run, rope_theta=1e6)
    with pytest.raises(UserError, match=r"rope_theta is 1000000.0 and .* has 10000.0; .* new stage: another `run` fol"):
        check(config, monkeypatch)
    monkeypatch.setattr(start, "new_progress", lambda recipe, stream: first_stage.progress)
    with pytest.raises(UserError, match=r"has begun at random weights; name another `run` folder for a new stage"):
        start.check_run_folder(second_stage(first_stage, run), None)
    start.check_run_folder(second_stage(first_stage, run, start_from=None), None)


def test_where_a_run_began_is_remembered_by_whatever_path(first_stage, monkeypatch, tmp_path):
    """Also by checkpoints that a start without the key has written."""
    run = first_stage.folder.parent.parent
    begun = replace(first_stage.progress, begun_from=str(first_stage.folder.resolve()))
    reader = SimpleNamespace(progress=begun, optimizer="adamw")
    monkeypatch.setattr(start, "open_weights", lambda recipe, path: reader)
    monkeypatch.chdir(first_stage.folder.parent)
    for path in (first_stage.folder, first_stage.folder.name, None):
        config = second_stage(first_stage, run, start_from=path and str(path))
        stream = SimpleNamespace(num_tokens=begun.num_tokens, facts=dict)
        assert start.new_progress(config, stream).begun_from == (path and begun.begun_from)
        monkeypatch.setattr(start, "_counted_by", lambda progress: {})
        start.check_run_folder(config, stream)
    with pytest.raises(UserError, match="has begun from"):
        start.check_run_folder(second_stage(first_stage, run, start_from=str(tmp_path)), stream)


def test_what_is_no_checkpoint_is_told_by_what_it_is(first_stage, tmp_path, monkeypatch):
    run = first_stage.folder.parent.parent
    with pytest.raises(UserError, match=r"holds no checkpoint .*; name one of .*/checkpoints/step_\*"):
        CheckpointReader(run)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no checkpoint .*; megacode convert from-hf .* makes one of it"):
        CheckpointReader(tmp_path)


def test_what_a_killed_run_left_is_room_for_the_next_checkpoint(tmp_path, monkeypatch):
    """It is removed before that is written, but after this is asked."""
    (tmp_path / "tokenizer.model").write_bytes(b"any")
    config = recipe(run=str(tmp_path / "run"), tokenizer={"path": str(tmp_path / "tokenizer.model")})
    needed = origin.checkpoint_bytes(config)
    monkeypatch.setattr(origin.shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed // 2))
    with pytest.raises(UserError, match="make room, or name a `run` folder on another disk"):
        origin.check_disk(config)
    for name in ("step_00000002.partial", ".step_00000001.removed"):
        left = tmp_path / "run/checkpoints" / name
        left.mkdir(parents=True)
        (left / "weights_00000.safetensors").write_bytes(b"0" * (needed // 3))
    origin.check_disk(config)
    (left / "weights_00000.safetensors").unlink()
    with pytest.raises(UserError, match="make room"):
        origin.check_disk(config)
