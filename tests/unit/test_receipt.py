"""The receipt agrees with a right export, and names what is wrong with each kind of wrong one."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exports import write_checkpoint

from megacode.checkpoint.convert import exporting_receipt
from megacode.checkpoint.convert.exporting import export
from megacode.checkpoint.convert.exporting_receipt import check_export
from megacode.checkpoint.convert.folder import RECEIPT
from megacode.checkpoint.convert.receipt import ConversionError
from megacode.errors import UserError
from megacode.model.llama import num_parameters

TEXTS = ["def f(x):\n    return x + 1\n", "class A:\n\tpass  # </s>\n", ""]
Q, K = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.set_num_threads(2)
    return write_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export(checkpoint, folder, "fp32", check=lambda written: None)
    return folder


@pytest.mark.parametrize(("dtype", "max_file_bytes"), [("fp32", 5_000_000_000), ("bf16", 100_000)])
def test_a_right_export_agrees(checkpoint, tmp_path, dtype, max_file_bytes):
    seen = []

    def check(folder):
        check_export(checkpoint, folder, TEXTS, lambda done, total: seen.append((done, total)))

    export(checkpoint, tmp_path / "hf", dtype, check=check, max_file_bytes=max_file_bytes)
    written = json.loads((tmp_path / "hf" / RECEIPT).read_text())
    assert written["agrees"]
    assert (written["step"], written["dtype"]) == (7, dtype)
    checks = {check["name"]: check for check in written["checks"]}
    assert list(checks) == ["layout", "config", "tokenizer", "values", "logits", "rotary"]
    assert not any(check["disagreements"] for check in checks.values())
    assert checks["layout"]["figures"]["num_parameters"] == num_parameters(checkpoint.model)
    assert checks["logits"]["figures"]["largest_difference"] <= checks["logits"]["figures"]["tolerance"]
    assert checks["logits"]["figures"]["largest_logit"] > 1  # else the tolerance would hide much
    assert written["versions"]["transformers"]
    files = {path.name for path in (tmp_path / "hf").iterdir()} - {RECEIPT}
    assert set(written["sha256"]) == files
    assert all(
        written["sha256"][name] == hashlib.sha256((tmp_path / "hf" / name).read_bytes()).hexdigest() for name in files
    )
    assert seen == [(number, 3) for number in range(1, 4)]


def interleaved(weight, heads):
    """Rows of half-split pairs -> rows of interleaved pairs, as a converter to Meta's layout does."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def permute_q_and_k(tensors, config):
    tensors[Q] = interleaved(tensors[Q], config["num_attention_heads"])
    tensors[K] = interleaved(tensors[K], config["num_key_value_heads"])


def permute_q(tensors, config):
    tensors[Q] = interleaved(tensors[Q], config["num_attention_heads"])


def swap_gate_and_up(tensors, config):
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def change_epsilon(tensors, config):
    config["rms_norm_eps"] = 1e-4


def use_another_eos(tensors, config):
    config["eos_token_id"] = 5


def use_an_id_beyond_the_rows(tensors, config):
    config["pad_token_id"] = config["vocab_size"]


def change_theta(tensors, config):
    config["rope_parameters"]["rope_theta"] = 1e6


def change_one_value(tensors, config):
    tensors["model.norm.weight"][3] = 1.00001


def pad_the_embedding(tensors, config):
    tensors["model.embed_tokens.weight"] = torch.nn.functional.pad(tensors["model.embed_tokens.weight"], (0, 0, 0, 1))


def pad_everything(tensors, config):
    pad_the_embedding(tensors, config)
    tensors["lm_head.weight"] = torch.nn.functional.pad(tensors["lm_head.weight"], (0, 0, 0, 1))
    config["vocab_size"] += 1


def leave_one_out(tensors, config):
    del tensors[K]


def add_one(tensors, config):
    tensors["model.layers.2.input_layernorm.weight"] = torch.ones(64)


def use_nan(tensors, config):
    tensors["lm_head.weight"][5, 5] = float("nan")


WRONG = [
    (permute_q_and_k, {"values", "logits", "rotary"}),
    (permute_q, {"values", "logits", "rotary"}),
    (swap_gate_and_up, {"values", "logits"}),
    (change_epsilon, {"config", "logits"}),
    (use_another_eos, {"config"}),
    (use_an_id_beyond_the_rows, {"config"}),
    (change_theta, {"config", "logits", "rotary"}),
    (change_one_value, {"values"}),
    (pad_the_embedding, {"layout"}),
    (pad_everything, {"layout", "config"}),
    (leave_one_out, {"layout"}),
    (add_one, {"layout"}),
    (use_nan, {"values", "logits"}),
]


@pytest.mark.parametrize(("spoil", "expected"), WRONG, ids=[spoil.__name__ for spoil, _ in WRONG])
def test_wrong_weights_are_found(checkpoint, exported, tmp_path, monkeypatch, spoil, expected):
    monkeypatch.setattr(exporting_receipt, "NUM_FUZZED", 20)  # the tokenizer has its own test
    folder = shutil.copytree(exported, tmp_path / "hf")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    spoil(tensors, config)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    assert found_in(checkpoint, folder) == expected


def swap_two_pieces(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def leave_out_the_dummy_prefix(tokenizer):
    tokenizer["normalizer"]["normalizers"].pop(0)


@pytest.mark.parametrize("spoil", [swap_two_pieces, leave_out_the_dummy_prefix])
def test_a_wrong_tokenizer_is_found(checkpoint, exported, tmp_path, spoil):
    folder = shutil.copytree(exported, tmp_path / "hf")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    spoil(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert found_in(checkpoint, folder) == {"tokenizer"}


def test_a_missing_bos_is_found(checkpoint, exported, tmp_path):
    """Two places say it: transformers takes the one if the other is silent."""
    folder = shutil.copytree(exported, tmp_path / "hf")
    for name, key, value in [
        ("tokenizer.json", "post_processor", None),
        ("tokenizer_config.json", "add_bos_token", False),
    ]:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, key: value}))
    assert found_in(checkpoint, folder) == {"tokenizer"}


def test_llamas_own_tokenizer_class_is_found(checkpoint, exported, tmp_path):
    """LlamaTokenizer builds another pipeline than tokenizer.json's: the reason for the class that we name."""
    folder = shutil.copytree(exported, tmp_path / "hf")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    assert found_in(checkpoint, folder) == {"tokenizer"}


def test_a_tokenizer_that_does_not_load_is_found(checkpoint, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").unlink()
    assert found_in(checkpoint, folder) == {"tokenizer"}


def test_a_receipt_that_cannot_be_written_is_one_line(checkpoint, exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "hf")
    (folder / RECEIPT).mkdir()
    with pytest.raises(UserError, match=rf"cannot write .*{RECEIPT}: Is a directory"):
        check_export(checkpoint, folder, TEXTS)


def found_in(checkpoint, folder):
    """Names of the checks that disagree: the same in the error and in the receipt."""
    with pytest.raises(ConversionError) as caught:
        check_export(checkpoint, folder, TEXTS)
    written = json.loads((folder / RECEIPT).read_text())
    assert not written["agrees"]
    found = {check["name"] for check in written["checks"] if check["disagreements"]}
    assert all(f"{name}: " in str(caught.value) for name in found)
    return found
