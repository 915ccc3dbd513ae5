"""megacode.checkpoint.earlier: what is said of a damaged checkpoint, and that it holds."""

import json
import shutil

import pytest
from support.exports import write_checkpoint
from support.saving import save_step
from support.training import recipe

from megacode.checkpoint.keep import newest, step_of
from megacode.checkpoint.origin import open_weights
from megacode.checkpoint.reader import CheckpointReader
from megacode.checkpoint.store import step_folder
from megacode.errors import UserError


@pytest.fixture
def run(tmp_path):
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    return tmp_path


def alter(folder):
    path = folder / "weights_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def said(folder):
    with pytest.raises(UserError) as error:
        CheckpointReader(folder).verify()
    assert "\n" not in str(error.value)
    return str(error.value)


SPOIL = {
    "weights_00000.safetensors is damaged (its checksum differs)": alter,
    "optimizer_00000.safetensors is missing": lambda folder: (folder / "optimizer_00000.safetensors").unlink(),
    "manifest.json is damaged (not JSON)": lambda folder: (folder / "manifest.json").write_text("{"),
    " holds no checkpoint (manifest.json: No such file or directory)": lambda f: (f / "manifest.json").unlink(),
}


@pytest.mark.parametrize("what", SPOIL)
def test_the_earlier_one_is_named_and_is_what_the_next_start_takes(run, what):
    folder = step_folder(run, 3)
    SPOIL[what](folder)
    text = said(folder)
    assert what in text
    assert text.endswith(f"; the run has an earlier one: move {folder} away, and the next start takes step 2")
    assert newest(run) == folder, "not by itself"
    folder.rename(folder.with_name("step_00000003.bad"))
    assert step_of(newest(run)) == 2
    CheckpointReader(newest(run)).verify()


def test_those_between_that_are_not_whole_have_to_go_as_well(run):
    alter(step_folder(run, 3))
    (step_folder(run, 2) / "manifest.json").write_text("[]")
    away = f"move {step_folder(run, 2)} and {step_folder(run, 3)} away, and the next start takes step 1"
    assert said(step_folder(run, 3)).endswith(f"; the run has an earlier one: {away}")
    (step_folder(run, 1) / "optimizer_00000.safetensors").write_bytes(b"")
    again = f"bring this one back from a copy, or move {run}/checkpoints away to begin again"
    assert said(step_folder(run, 3)).endswith(f"; the run has no earlier one that is whole: {again}")
    shutil.rmtree(step_folder(run, 1))
    shutil.rmtree(step_folder(run, 2))
    assert said(step_folder(run, 3)).endswith(f"; the run has no earlier one: {again}")


def test_of_an_older_one_the_newest_is_named(run):
    alter(step_folder(run, 2))
    assert said(step_folder(run, 2)).endswith(f"; the run's newest that looks whole is {step_folder(run, 3)}")


def test_a_folder_of_no_run_has_no_earlier_one(run, tmp_path):
    step_folder(run, 3).rename(tmp_path / "converted")
    alter(tmp_path / "converted")
    assert said(tmp_path / "converted").endswith("; bring the file back from a copy, or make the folder again")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), r"cannot be read \(No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"is damaged \(its checksum differs\)"),
    ],
)
def test_a_tokenizer_that_is_missing_or_altered_is_damage(tmp_path, spoil, said):
    write_checkpoint(tmp_path, step=6)
    reader = write_checkpoint(tmp_path, step=7)
    spoil(reader.tokenizer_path)
    model = json.loads((reader.folder / "manifest.json").read_text())["model"]
    config = recipe(run=str(tmp_path), model=model, tokenizer={"path": str(tmp_path / "tokenizer.model")})
    with pytest.raises(UserError, match=rf"tokenizer.model {said}.*the next start takes step 6$"):
        open_weights(config, reader.folder)
