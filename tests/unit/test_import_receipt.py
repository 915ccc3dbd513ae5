"""The receipt of a converted checkpoint names what is wrong with each kind of wrong one, and with a wrong source."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conversions import shape, weights, write_hf, write_meta
from support.exports import train_tokenizer

from megacode.checkpoint.convert import importing, importing_receipt, stored
from megacode.checkpoint.convert.folder import RECEIPT
from megacode.checkpoint.convert.hf_source import HfSource
from megacode.checkpoint.convert.importing_receipt import check_import
from megacode.checkpoint.convert.meta_source import MetaSource, to_halves
from megacode.checkpoint.convert.receipt import ConversionError
from megacode.checkpoint.convert.reference import Reference
from megacode.checkpoint.reader import sealed
from megacode.data import engines

TEXTS = ["def f(x):\n    return x + 1\n"]
Q, K = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qk")
GATE, UP = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("sources")
    tokenizer = train_tokenizer(folder / "tokenizer.model")
    model = shape(tokenizer)
    tensors = weights(model, torch.float32)
    write_hf(folder / "hf", model, tensors, tokenizer)
    write_meta(folder / "meta", model, tensors, tokenizer, 2)
    return folder


def opened(folder, kind):
    if kind == "hf":
        source = HfSource(folder / "hf")
        return source, Reference.of_hf(source.folder)
    source = MetaSource(folder / "meta")
    return source, Reference.of_meta(source.folder)


def permute_q_and_k(tensors, model):
    tensors[Q], tensors[K] = to_halves(tensors[Q], 16), to_halves(tensors[K], 8)


def permute_k_by_other_heads(tensors, model):
    tensors[K] = to_halves(tensors[K], 4)


def swap_gate_and_up(tensors, model):
    tensors[GATE], tensors[UP] = tensors[UP], tensors[GATE]


def change_one_value(tensors, model):
    tensors["model.norm.weight"][3] += 1e-6


def change_theta(tensors, model):
    model["rope_theta"] = 1e4


def change_epsilon(tensors, model):
    model["norm_epsilon"] = 1e-4


def pad_the_head(tensors, model):
    tensors["lm_head.weight"] = torch.nn.functional.pad(tensors["lm_head.weight"], (0, 0, 0, 8))


def leave_one_out(tensors, model):
    del tensors[K]


WRONG = [
    (permute_q_and_k, {"values", "logits", "rotary"}),
    (permute_k_by_other_heads, {"values", "logits", "rotary"}),
    (swap_gate_and_up, {"values", "logits"}),
    (change_one_value, {"values"}),
    (change_theta, {"config", "logits", "rotary"}),
    (change_epsilon, {"config", "logits"}),
    (pad_the_head, {"layout"}),
    (leave_one_out, {"layout"}),
]


@pytest.mark.parametrize("kind", ["hf", "meta"])
@pytest.mark.parametrize(("spoil", "expected"), WRONG, ids=[spoil.__name__ for spoil, _ in WRONG])
def test_wrong_weights_are_found(made, tmp_path, monkeypatch, kind, spoil, expected):
    monkeypatch.setattr(importing_receipt, "NUM_FUZZED", 5)
    source, reference = opened(made, kind)

    def check(folder):
        path, manifest = folder / "weights_00000.safetensors", json.loads((folder / "manifest.json").read_text())
        tensors = load_file(path)
        spoil(tensors, manifest["model"])
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
        with pytest.raises(ConversionError) as caught:
            check_import(source, reference, folder, TEXTS)
        written = json.loads((folder / RECEIPT).read_text())
        assert not written["agrees"]
        assert {each["name"] for each in written["checks"] if each["disagreements"]} == expected
        assert all(f"{name}: " in str(caught.value) for name in expected)

    importing.convert(source, (made / "tokenizer.model").read_bytes(), tmp_path / "own", check=check)


@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_the_reference_notices_a_wrong_reading_of_the_source(made, tmp_path, monkeypatch, kind):
    """Where conversion itself reads theta wrong, what it compares with does not."""
    monkeypatch.setattr(importing_receipt, "NUM_FUZZED", 5)
    source, reference = opened(made, kind)
    source.model = source.model.model_copy(update={"rope_theta": 1e4})
    with pytest.raises(ConversionError, match="rotary: attention scores differ"):
        importing.convert(
            source,
            (made / "tokenizer.model").read_bytes(),
            tmp_path / "own",
            check=lambda folder: check_import(source, reference, folder, TEXTS),
        )


@pytest.mark.parametrize("kind", ["hf", "meta"])
def test_a_misread_file_is_found(made, tmp_path, monkeypatch, kind):
    """Where conversion takes other rows out of the source's files than their format's library."""
    monkeypatch.setattr(importing_receipt, "NUM_FUZZED", 5)
    source, reference = opened(made, kind)
    file = stored.SafetensorsFile if kind == "hf" else stored.TorchFile
    right = file.read
    monkeypatch.setattr(file, "read", lambda self, name: right(self, name).flip(0))

    def check(folder):
        with pytest.raises(ConversionError, match=r"values: .*logits: .*rotary: "):
            check_import(source, reference, folder, TEXTS)

    importing.convert(source, (made / "tokenizer.model").read_bytes(), tmp_path / "own", check=check)


def letter_by_letter(model, *rest):
    """An engine whose ids give back the text, but are not SentencePiece's."""
    oracle = engines.sentencepiece(model)

    def continuation(text):
        return np.concatenate([oracle.continuation(letter) for letter in text])

    def document(text):
        return np.concatenate([oracle.document(text[0]), *(oracle.continuation(letter) for letter in text[1:])])

    return replace(oracle, name="letters 1", document=document, continuation=continuation)


def test_an_engine_with_other_ids_is_found(made, tmp_path, monkeypatch):
    """What training would encode with is what is compared, not SentencePiece with itself."""
    monkeypatch.setattr(engines, "fastest", letter_by_letter)
    source, reference = opened(made, "hf")

    def check(folder):
        with pytest.raises(ConversionError, match=r"tokenizer: letters 1 gives the text .* other ids"):
            check_import(source, reference, folder, TEXTS)

    importing.convert(source, (made / "tokenizer.model").read_bytes(), tmp_path / "own", check=check)
