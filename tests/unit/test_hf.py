"""The exported folder: what is in it, in what pieces, and when it may be written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.exports import write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from megacode.checkpoint.convert import exporting
from megacode.checkpoint.convert import folder as target
from megacode.checkpoint.convert.weights import plan_files
from megacode.checkpoint.reader import DTYPES, CheckpointReader
from megacode.errors import UserError
from megacode.model.llama import num_parameters
from megacode.recipe import ModelSection


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run"))


def unchecked(folder):
    """In place of the receipt, which test_receipt.py is about: leaves the mark of an export."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    (folder / target.RECEIPT).write_text(json.dumps({"sha256": dict.fromkeys(names, "")}))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_file(checkpoint, tmp_path, dtype):
    seen = []
    exporting.export(
        checkpoint, tmp_path / "hf", dtype, check=unchecked, progress=lambda done, total: seen.append((done, total))
    )
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(written) == set(checkpoint.names)
    for name, tensor in written.items():
        assert torch.equal(tensor, checkpoint.read(name).to(DTYPES[dtype]))
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    size = num_parameters(checkpoint.model) * DTYPES[dtype].itemsize
    assert seen[-1] == (size, size)
    assert len(seen) == len(checkpoint.names)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]  # nothing beside it is left


def test_many_files(checkpoint, tmp_path):
    limit = 200_000  # the embedding and the head, 616 rows of 64 in bf16, take 79 kB each
    exporting.export(checkpoint, tmp_path / "hf", "bf16", check=unchecked, max_file_bytes=limit)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 1
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    contents = {file: load_file(tmp_path / "hf" / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in contents.items() for name in tensors}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in contents.values()]
    assert max(sizes) <= limit
    assert index["metadata"]["total_size"] == sum(sizes) == 2 * num_parameters(checkpoint.model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(loaded.state_dict()["lm_head.weight"], checkpoint.read("lm_head.weight").bfloat16())


def test_a_parameter_beyond_the_limit_stands_alone(checkpoint):
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names}
    assert plan_files(shapes, torch.float32, max_file_bytes=1) == [[name] for name in checkpoint.names]


def test_config(checkpoint, tmp_path):
    exporting.export(checkpoint, tmp_path / "hf", "bf16", check=unchecked)
    config, model = AutoConfig.from_pretrained(tmp_path / "hf"), checkpoint.model
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.dtype == torch.bfloat16
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": model.rope_theta}
    assert config.max_position_embeddings == model.max_positions
    assert (config.vocab_size, config.num_key_value_heads, config.head_dim) == (model.vocabulary, 2, 16)
    assert not config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id) == (1, 2)


def test_config_is_code_llamas():
    """The values of HuggingFace's codellama/CodeLlama-7b-hf."""
    config = exporting.config_of(ModelSection.model_validate({"preset": "code-llama-7b"}), "bf16")
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32016,
    }
    assert {key: config[key] for key in expected} == expected


def test_only_an_earlier_export_is_replaced_and_only_with_force(checkpoint, tmp_path):
    hf = tmp_path / "hf"
    hf.mkdir()
    exporting.export(checkpoint, hf, "bf16", check=unchecked)  # an empty folder may be filled
    (hf / "config.json").write_text("mark")
    with pytest.raises(UserError, match="--force"):
        exporting.export(checkpoint, hf, "bf16", check=unchecked)
    assert (hf / "config.json").read_text() == "mark"
    exporting.export(checkpoint, hf, "bf16", check=unchecked, force=True)
    assert (hf / "config.json").read_text() != "mark"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_foreign_folders_and_files_are_kept(checkpoint, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").touch()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no conversion of megacode"):
        exporting.export(checkpoint, tmp_path / "folder", "bf16", check=unchecked, force=True)
    with pytest.raises(UserError, match="is a file"):
        exporting.export(checkpoint, tmp_path / "file", "bf16", check=unchecked, force=True)


@pytest.mark.parametrize("foreign", ["notes.txt", "inner/config.json", f"inner/{target.RECEIPT}"])
def test_what_an_earlier_export_did_not_write_is_never_replaced(checkpoint, tmp_path, foreign):
    hf = tmp_path / "hf"
    exporting.export(checkpoint, hf, "bf16", check=unchecked)
    (hf / foreign).parent.mkdir(exist_ok=True)
    (hf / foreign).touch()
    with pytest.raises(UserError, match=f"{foreign} is not of the conversion that --force would replace"):
        exporting.export(checkpoint, hf, "bf16", check=unchecked, force=True)
    assert (hf / foreign).exists()
    assert not target.temporary_folder(hf).exists()


def test_what_comes_into_it_meanwhile_stays(checkpoint, tmp_path):
    hf = tmp_path / "hf"
    exporting.export(checkpoint, hf, "bf16", check=unchecked)
    with pytest.raises(UserError, match=r"notes\.txt is not of"):
        exporting.export(checkpoint, hf, "bf16", check=lambda folder: (hf / "notes.txt").touch(), force=True)
    assert (hf / "notes.txt").exists()


def test_an_export_with_a_damaged_receipt_is_not_replaced(checkpoint, tmp_path):
    exporting.export(checkpoint, tmp_path / "hf", "bf16", check=unchecked)
    for text in ("{", "[]", "{}", '{"sha256": 1}'):
        (tmp_path / "hf" / target.RECEIPT).write_text(text)
        with pytest.raises(UserError, match=f"{target.RECEIPT} is damaged"):
            exporting.export(checkpoint, tmp_path / "hf", "bf16", check=unchecked, force=True)


def test_source_and_target_lie_apart(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(checkpoint.folder, target_is_directory=True)
    files = sorted(checkpoint.folder.iterdir())
    monkeypatch.chdir(checkpoint.folder)
    for folder, said in [
        (checkpoint.folder, "is what is converted"),
        (tmp_path / "link", "is what is converted"),
        (Path("hf"), "lies in"),
        (checkpoint.folder.parent, "lies in"),
    ]:
        with pytest.raises(UserError, match=said):
            exporting.export(checkpoint, folder, "bf16", check=unchecked, force=True)
    assert sorted(checkpoint.folder.iterdir()) == files


def test_what_disagreed_is_not_lost_by_converting_it(checkpoint, tmp_path):
    """A conversion that disagreed keeps its temporary name, which the next of that target begins by removing."""
    left = Path(shutil.copytree(checkpoint.folder, target.temporary_folder(tmp_path / "hf")))
    with pytest.raises(UserError, match="is what is converted"):
        exporting.export(CheckpointReader(left), tmp_path / "hf", "bf16", check=unchecked)
    assert (left / "manifest.json").exists()


def test_a_failed_check_gives_no_folder(checkpoint, tmp_path):
    def refuse(folder):
        assert (folder / "model.safetensors").exists()
        raise RuntimeError("it disagrees")

    for _ in range(2):  # what the first left does not stop the second
        with pytest.raises(RuntimeError, match="it disagrees"):
            exporting.export(checkpoint, tmp_path / "hf", "bf16", check=refuse)
        assert not (tmp_path / "hf").exists()
        assert target.temporary_folder(tmp_path / "hf").exists()
    exporting.export(checkpoint, tmp_path / "hf", "bf16", check=unchecked)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_failed_check_keeps_the_earlier_export(checkpoint, tmp_path):
    exporting.export(checkpoint, tmp_path / "hf", "bf16", check=unchecked)
    (tmp_path / "hf" / "config.json").write_text("mark")
    with pytest.raises(ZeroDivisionError):
        exporting.export(checkpoint, tmp_path / "hf", "bf16", check=lambda folder: 1 // 0, force=True)
    assert (tmp_path / "hf" / "config.json").read_text() == "mark"


def test_a_small_disk_is_said_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    usage = target.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r" has 1000 B free and the conversion takes \d+\.\d KiB; make room"):
        exporting.export(checkpoint, tmp_path / "new" / "hf", "bf16", check=unchecked)
    assert not (tmp_path / "new").exists()


def test_a_file_system_that_does_not_say_its_size(checkpoint, tmp_path, monkeypatch):
    """As /proc, which has no place for a folder, and some of the network, which have."""
    with pytest.raises(UserError, match=r"^/proc/hf cannot be written \(No such file or directory\)"):
        exporting.export(checkpoint, Path("/proc/hf"), "bf16", check=unchecked)
    usage = target.shutil.disk_usage("/proc")
    assert usage.total == 0
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: usage)
    exporting.export(checkpoint, tmp_path / "hf", "bf16", check=unchecked)
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_an_error_while_checking_is_itself_and_keeps_what_was_written(checkpoint, tmp_path):
    """Not one of the disk, which would be mended by room and whose remains are taken away."""

    def check(folder):
        raise OSError("Can't load tokenizer")

    with pytest.raises(OSError, match="Can't load tokenizer") as caught:
        exporting.export(checkpoint, tmp_path / "hf", "bf16", check=check)
    assert not isinstance(caught.value, UserError)
    assert (target.temporary_folder(tmp_path / "hf") / "model.safetensors").exists()


def test_what_a_killed_conversion_left_makes_room_first(checkpoint, tmp_path, monkeypatch):
    left = target.temporary_folder(tmp_path / "hf")
    left.mkdir()
    usage = target.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        target.shutil, "disk_usage", lambda path: usage._replace(free=1000 if left.exists() else usage.free)
    )
    exporting.export(checkpoint, tmp_path / "hf", "bf16", check=unchecked)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_no_deepspeed():
    """Converting needs none."""
    code = "import sys, megacode.checkpoint.convert.exporting_receipt; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
