"""`megacode convert to-hf` from a run on disk to a folder that transformers loads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.exports import write_checkpoint
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from megacode.checkpoint.convert import compare
from megacode.checkpoint.convert.folder import RECEIPT, temporary_folder
from megacode.checkpoint.store import step_folder
from megacode.errors import UserError
from megacode.tools.convert import app, checkpoint_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(2)
    run = tmp_path_factory.mktemp("run")
    write_checkpoint(run, step=9, seed=1)
    write_checkpoint(run, step=10, seed=2)
    (run / "checkpoints" / "step_00000011.partial").mkdir()
    return run


def convert(*words):
    return CliRunner().invoke(app, ["to-hf", *map(str, words)])


def test_newest_of_a_run(run, tmp_path):
    result = convert(run, tmp_path / "hf")
    assert result.exit_code == 0, result.output
    assert "step 10 in bf16 stands in" in result.stdout
    assert result.stdout.count("agrees") == 6
    assert json.loads((tmp_path / "hf" / RECEIPT).read_text())["agrees"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


def test_a_step_in_fp32_as_json(run, tmp_path):
    (tmp_path / "code.c").write_bytes("int x;\r\n\tü".encode())
    words = ["--dtype", "fp32", "--text", tmp_path / "code.c", "--text", __file__, "--json", "-"]
    result = convert(step_folder(run, 9), tmp_path / "hf", *words)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "hf" / RECEIPT).read_text())
    assert (printed["agrees"], printed["step"], printed["dtype"]) == (True, 9, "fp32")
    assert next(check["figures"]["texts"] for check in printed["checks"] if check["name"] == "tokenizer") == 2


def test_again_needs_force(run, tmp_path):
    assert convert(run, tmp_path / "hf").exit_code == 0
    refused = convert(run, tmp_path / "hf").exception
    assert isinstance(refused, UserError)
    assert "--force" in str(refused)
    assert convert(run, tmp_path / "hf", "--force").exit_code == 0


def test_disagreement_exits_with_1_and_leaves_no_folder(run, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROTARY_TOLERANCE", -1.0)
    result = convert(run, tmp_path / "hf")
    assert result.exit_code == 1
    assert "rotary" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "hf").exists()
    assert not json.loads((temporary_folder(tmp_path / "hf") / RECEIPT).read_text())["agrees"]


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    folder = write_checkpoint(tmp_path / "run").folder
    file = next(folder.glob("weights_*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused = convert(folder, tmp_path / "hf").exception
    assert isinstance(refused, UserError)
    assert "damaged" in str(refused)
    assert not (tmp_path / "hf").exists()


def test_wrong_words(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for words, named in [
        ((tmp_path / "nowhere", tmp_path / "hf"), "no folder"),
        ((tmp_path, tmp_path / "hf"), "no finished checkpoint"),
        ((tmp_path / "checkpoints", tmp_path / "hf"), "no finished checkpoint"),
        ((tmp_path / "empty", tmp_path / "hf"), "holds no checkpoint"),
        ((run, tmp_path / "hf", "--text", tmp_path / "binary"), "not UTF-8"),
        ((run, tmp_path / "hf", "--text", tmp_path / "nothing"), "cannot read"),
    ]:
        refused = convert(*words).exception
        assert isinstance(refused, UserError)
        assert named in str(refused)
        assert "\n" not in str(refused)


def test_which_checkpoint_a_path_means(run, tmp_path, monkeypatch):
    assert checkpoint_folder(run) == step_folder(run, 10)
    assert checkpoint_folder(step_folder(run, 9)) == step_folder(run, 9)
    assert checkpoint_folder(run / "checkpoints") == step_folder(run, 10)
    weights, confusing = tmp_path / "weights" / "checkpoints", tmp_path / "run" / "checkpoints"
    shutil.copytree(step_folder(run, 9), weights)
    assert checkpoint_folder(weights) == weights
    shutil.copytree(run / "checkpoints", confusing / "checkpoints")
    assert checkpoint_folder(confusing) == step_folder(confusing, 10)
    monkeypatch.chdir(run / "checkpoints")
    assert checkpoint_folder(Path()) == step_folder(run, 10)
