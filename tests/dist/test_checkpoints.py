"""Checkpoints know no layout: saved in one, resumed in another, and bit for bit in the same."""

import json
import math

import pytest
import torch
from support.training import deviation, parallel, recipe, reference, values_read

from megacode.checkpoint.keep import newest
from megacode.checkpoint.reader import CheckpointReader, global_order, sealed
from megacode.checkpoint.store import step_folder
from megacode.errors import UserError

SAVED = {"tensor": 2, "pipeline": 2, "zero": 3}


def config(tmp_path, **layout):
    (tmp_path / "tokenizer.model").write_bytes(b"any")
    return recipe(parallel=layout, tokenizer={"path": str(tmp_path / "tokenizer.model")}, run=str(tmp_path))


@pytest.fixture
def saved(worlds, tmp_path):
    """A checkpoint after two steps, from eight processes."""
    folder = step_folder(tmp_path, 2)
    worlds(8).run(parallel, config(tmp_path, **SAVED), 2, (), None, folder)
    return folder


def test_a_checkpoint_is_the_whole_model(saved, tmp_path):
    expected = reference(config(tmp_path), 2)
    reader = CheckpointReader(saved)
    assert newest(tmp_path) == saved
    assert reader.names == sorted(expected.weights, key=global_order)
    assert reader.progress.step == reader.progress.adam_step == 2
    assert reader.progress.next_sample == 16
    reader.verify()
    for name, want in expected.weights.items():
        assert reader.shape(name) == tuple(want.shape)
        torch.testing.assert_close(reader.read(name), want, atol=1e-4, rtol=0)
    # Each data rank keeps its share: no file holds much more than an eighth of the weights.
    sizes = [entry["bytes"] for file, entry in reader.manifest["files"].items() if file.startswith("weights")]
    assert len(sizes) == 8
    assert max(sizes) < 0.3 * sum(sizes)


@pytest.mark.parametrize("zero", [1, 3])
def test_a_data_rank_reads_what_it_keeps(worlds, saved, tmp_path, zero):
    whole = sum(math.prod(CheckpointReader(saved).shape(name)) for name in CheckpointReader(saved).names)
    weights, moments, _ = zip(*worlds(4).run(values_read, config(tmp_path, zero=zero), saved), strict=True)
    # Rows are read whole. Under ZeRO-1 every rank computes with all weights, under ZeRO-3 with norms without a gather.
    assert 2 * whole <= sum(moments) < 2.1 * whole
    assert sum(weights) == 4 * whole if zero == 1 else whole <= sum(weights) < 1.1 * whole


@pytest.mark.parametrize("zero", [1, 3])
def test_a_share_that_is_padding_alone_is_zero_after_a_load(worlds, tmp_path, zero):
    """33 rows over two tensor ranks: of the second one's, the second data rank has nothing but padding."""
    layout, folder = config(tmp_path, tensor=2, zero=zero), step_folder(tmp_path, 1)
    layout = layout.model_copy(update={"model": layout.model.model_copy(update={"vocabulary": 33})})
    worlds(4).run(parallel, layout, 1, (), None, folder)
    assert [padded for *_, padded in worlds(4).run(values_read, layout, folder)] == [0] * 4


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {"zero": 1}),
        (2, {"tensor": 2, "zero": 2}),
        (4, {"pipeline": 4, "zero": 3}),
        (4, {"pipeline": 2, "virtual_stages": 2, "zero": 1}),
        (8, {"zero": 3}),
    ],
    ids=str,
)
def test_any_layout_goes_on_from_it(worlds, saved, tmp_path, world_size, layout):
    straight = reference(config(tmp_path), 4)
    straight.losses, straight.norms = straight.losses[2:], straight.norms[2:]
    ranks = worlds(world_size).run(parallel, config(tmp_path, **layout), 2, (), saved)
    for outcome, _ in ranks:
        outcome.gradients.clear()  # the reference keeps those of its own first step
    outcome = deviation(straight, ranks)
    assert outcome["loss"] < 1e-5
    assert outcome["norm"] < 1e-4
    assert outcome["weight"] < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_layout_goes_on_bit_for_bit(worlds, tmp_path, precision):
    layout = config(tmp_path, tensor=2, pipeline=2, zero=3).model_copy(update={"precision": precision})
    folder = tmp_path / "half"
    worlds(8).run(parallel, layout, 2, (), None, folder)
    resumed = worlds(8).run(parallel, layout, 2, (), folder)
    straight = worlds(8).run(parallel, layout, 4)
    for (have, _), (want, _) in zip(resumed, straight, strict=True):
        assert have.losses == want.losses[2:]
        assert have.norms == want.norms[2:]
        for name, weight in want.weights.items():
            assert torch.equal(have.weights[name], weight), name


def test_adams_step_count_is_restored(worlds, saved, tmp_path):
    """DeepSpeed restores moments by name but no step count; without it the bias correction starts again."""
    straight = reference(config(tmp_path), 4)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["progress"]["adam_step"] = 0
    (saved / "manifest.json").write_text(json.dumps(sealed(manifest)))
    ranks = worlds(2).run(parallel, config(tmp_path), 2, (), saved)
    outcome, parts = ranks[0]
    worst = max(float((outcome.weights[n] - p.take(straight.weights[n])).abs().max()) for n, p in parts.items())
    assert worst > 1e-3


def test_damage_is_found_before_anything_is_loaded(saved, tmp_path):
    file = next(iter(CheckpointReader(saved).manifest["files"]))
    data = bytearray((saved / file).read_bytes())
    data[-1] ^= 1
    (saved / file).write_bytes(data)
    with pytest.raises(UserError, match=f"{file} is damaged"):
        CheckpointReader(saved).verify()
    (saved / file).write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{file} has not the size"):
        CheckpointReader(saved).verify()
    (saved / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        CheckpointReader(saved).verify()


def test_folders_that_are_no_checkpoint(saved, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        CheckpointReader(tmp_path)
    (saved / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        CheckpointReader(saved)
    (saved / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="has format 99"):
        CheckpointReader(saved)


def test_a_checkpoint_still_being_written_does_not_count(tmp_path):
    folder = step_folder(tmp_path, 5)
    folder.with_name(folder.name + ".partial").mkdir(parents=True)
    assert newest(tmp_path) is None


def test_a_rank_that_cannot_write_stops_all_with_its_reason(worlds, tmp_path):
    """The reason of one rank reaches every rank, and nothing that looks finished is left."""
    folder = step_folder(tmp_path, 1)
    broken = config(tmp_path, pipeline=2).model_copy(update={"tokenizer": recipe().tokenizer})  # its file is missing
    with pytest.raises(AssertionError, match=r"rank 1:(.|\n)*could not be written: .*No such file"):
        worlds(2).run(parallel, broken, 1, (), None, folder)
    assert newest(tmp_path) is None
