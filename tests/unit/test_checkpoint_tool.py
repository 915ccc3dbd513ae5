"""`megacode checkpoint inspect|verify|prune`."""

import json

import pytest
from support.exports import write_checkpoint
from support.saving import save_step
from typer.testing import CliRunner

from megacode.checkpoint.keep import finished, newest, step_of
from megacode.checkpoint.reader import sealed
from megacode.checkpoint.store import step_folder
from megacode.errors import UserError
from megacode.tools.checkpoint import app


def call(*words):
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    write_checkpoint(run, step=9)
    write_checkpoint(run, step=10)
    return run


def test_inspect_says_what_a_checkpoint_is(run):
    said = call("inspect", run, "--tensors").stdout
    lines = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert lines["checkpoint"] == str(step_folder(run, 10))
    assert lines["step"] == "10 (Adam's count 10, next sample 0)"
    assert lines["model"].startswith("nano: ")
    assert "2 layers, hidden 64" in lines["model"]
    assert lines["weights"] == "fp32, of a run in bf16"
    assert lines["optimizer"] == "adamw"
    ranks = "data 1, pipeline 1, virtual_stages 1, context 1, tensor 1, zero 1"
    assert f"written by  a run of 1 process: {ranks}\n" in said
    assert lines["others"] == "step_00000009"
    assert "model.norm.weight  64  whole in 0" in said
    vocabulary = json.loads((newest(run) / "manifest.json").read_text())["model"]["vocabulary"]
    assert f"lm_head.weight  {vocabulary} x 64  " in said


def rewrite(folder, edit):
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))


def test_inspect_says_who_wrote_it(tmp_path):
    folder = step_folder(tmp_path, 1)
    write_checkpoint(tmp_path, step=1)

    def writer():
        return next(
            line.removeprefix("written by").strip()
            for line in call("inspect", folder).stdout.splitlines()
            if line.startswith("written by")
        )

    rewrite(folder, lambda manifest: manifest.update(world_size=4))
    assert writer().startswith("a run of 4 processes: data 4, pipeline 1,")
    rewrite(folder, lambda manifest: manifest.pop("world_size"))
    assert writer().startswith("a run: pipeline 1,")
    (folder / "recipe.yaml").unlink()
    assert writer() == "unknown (recipe.yaml is missing)"
    rewrite(folder, lambda manifest: manifest.update(source={"format": "Meta", "origins": {}}))
    assert writer() == "a conversion from Meta"


def test_verify_counts_one_file(tmp_path):
    save_step(tmp_path, 1)
    folder = step_folder(tmp_path, 1)
    rewrite(folder, lambda manifest: manifest.update(optimizer=None))
    rewrite(folder, lambda manifest: [manifest["files"].pop(n) for n in list(manifest["files"]) if "weights" not in n])
    assert ": right: 1 file, " in call("verify", folder).stdout


def test_inspect_as_json(run):
    found = json.loads(call("inspect", step_folder(run, 9), "--json", "-").stdout)
    assert (found["step"], found["optimizer"], found["dtype"], found["others"]) == (9, "adamw", "fp32", [])
    assert found["bytes"] == sum(entry["bytes"] for entry in found["files"].values())
    assert sorted(found["files"]) == ["optimizer_00000.safetensors", "tokenizer.model", "weights_00000.safetensors"]
    assert "tensors" not in found


def test_verify_names_every_damaged_file(run):
    result = call("verify", run)
    assert result.exit_code == 0
    assert f"{newest(run)}: right: 3 files, " in result.stdout
    folder = step_folder(run, 9)
    data = bytearray((folder / "weights_00000.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights_00000.safetensors").write_bytes(data)
    (folder / "tokenizer.model").unlink()
    result = call("verify", folder, "--json", "-")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["damage"] == [
        f"{folder}/tokenizer.model is missing",
        f"{folder}/weights_00000.safetensors is damaged (its checksum differs)",
    ]


def test_verify_all_has_a_line_for_each_checkpoint(tmp_path):
    for step in range(1, 5):
        save_step(tmp_path, step)
    first, second, third, fourth = (step_folder(tmp_path, step) for step in range(1, 5))
    for path in (tmp_path, tmp_path / "checkpoints"):
        result = call("verify", path, "--all")
        assert result.exit_code == 0
        lines = result.stdout.splitlines()
        assert [line.split(": right: 3 files, ")[0] for line in lines] == list(map(str, (first, second, third, fourth)))
    cut(second)
    (third / "manifest.json").write_text("{")
    result = call("verify", tmp_path, "--all")
    assert result.exit_code == 1
    assert [line.split(": right")[0] for line in result.stdout.splitlines()] == [
        str(first),
        f"WRONG: {second}/weights_00000.safetensors has not the size that it was written with",
        f"WRONG: {third}/manifest.json is damaged (not JSON)",
        str(fourth),
    ]
    assert call("verify", tmp_path).exit_code == 0, "the newest is right"
    found = json.loads(call("verify", tmp_path, "--all", "--json", "-").stdout)["checkpoints"]
    assert [(each["checkpoint"], len(each["damage"])) for each in found] == [
        (str(first), 0), (str(second), 1), (str(third), 1), (str(fourth), 0),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"--all: .* is one checkpoint; leave --all out, or name its run folder"):
        raise call("verify", fourth, "--all").exception


def test_prune_removes_what_the_recipe_would(tmp_path):
    for step in range(1, 7):
        save_step(tmp_path, step)
    said = call("prune", tmp_path, "--keep-last", 2, "--keep-every", 2, "--dry-run", "--json", "-")
    assert json.loads(said.stdout)["removed"] == [str(step_folder(tmp_path, step)) for step in (1, 3)]
    assert len(finished(tmp_path)) == 6
    written = tmp_path / "checkpoints/step_00000007.partial"  # by a run that goes on
    written.mkdir()
    said = call("prune", tmp_path, "--keep-last", 2, "--keep-every", 2).stdout
    assert [step_of(folder) for folder in finished(tmp_path)] == [2, 4, 5, 6]
    assert written.is_dir()
    assert said.splitlines()[-1].startswith("4 kept, 2 removed (")


def test_the_newest_is_never_removed(tmp_path):
    save_step(tmp_path, 1)
    assert call("prune", tmp_path, "--keep-last", 0).exit_code == 2
    assert call("prune", tmp_path, "--keep-last", 1).exit_code == 0
    assert len(finished(tmp_path)) == 1


def test_the_folder_of_checkpoints_means_its_run(tmp_path):
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    folder = tmp_path / "checkpoints"
    lines = call("inspect", folder).stdout.splitlines()
    assert lines[0].split() == ["checkpoint", str(step_folder(tmp_path, 3))]
    assert lines[-1].split() == ["others", "step_00000001,", "step_00000002"]
    assert f"{step_folder(tmp_path, 3)}: right" in call("verify", folder).stdout
    assert call("prune", folder, "--keep-last", 1).exit_code == 0
    assert finished(tmp_path) == [step_folder(tmp_path, 3)]


def cut(folder):
    path = folder / "weights_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, "weights_00000.safetensors has not the size"),
        (lambda folder: (folder / "optimizer_00000.safetensors").unlink(), "optimizer_00000.safetensors is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: No such file"),
    ],
)
@pytest.mark.parametrize("damaged", [2, 4])
def test_nothing_is_removed_while_a_kept_one_is_damaged(tmp_path, spoil, said, damaged):
    for step in range(1, 5):
        save_step(tmp_path, step)
    spoil(step_folder(tmp_path, damaged))
    for words in ((), ("--dry-run",)):
        error = call("prune", tmp_path, "--keep-last", 1, "--keep-every", 2, *words).exception
        assert isinstance(error, UserError)
        assert said in str(error)
        assert f"megacode checkpoint verify {step_folder(tmp_path, damaged)}`" in str(error)
        assert "\n" not in str(error)
    assert [step_of(folder) for folder in finished(tmp_path)] == [1, 2, 3, 4]


def test_a_damaged_one_that_is_to_be_removed_is(tmp_path):
    for step in (1, 2):
        save_step(tmp_path, step)
    cut(step_folder(tmp_path, 1))
    assert call("prune", tmp_path, "--keep-last", 1).exit_code == 0
    assert finished(tmp_path) == [step_folder(tmp_path, 2)]


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    for words in (("prune", tmp_path, "--keep-last", 1), ("inspect", tmp_path), ("verify", tmp_path / "none")):
        error = call(*words).exception
        assert isinstance(error, UserError)
        assert str(tmp_path) in str(error)
