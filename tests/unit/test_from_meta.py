"""`megacode convert from-meta`: Meta's files against HuggingFace's of the same weights; what is refused."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from support.conversions import base_tokenizer, shape, weights, write_checklist, write_hf, write_meta
from support.exports import train_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from megacode.checkpoint.convert import checklist, exporting_receipt, importing_receipt
from megacode.checkpoint.convert.folder import RECEIPT, temporary_folder
from megacode.checkpoint.convert.meta_source import feed_forward_width, to_halves, to_pairs
from megacode.checkpoint.reader import CheckpointReader
from megacode.checkpoint.tensorfile import sha256
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError
from megacode.tools.convert import app


@pytest.fixture(autouse=True)
def few_fuzzed_texts(monkeypatch):
    """The tokenizer has its own tests."""
    monkeypatch.setattr(exporting_receipt, "NUM_FUZZED", 50)
    monkeypatch.setattr(importing_receipt, "NUM_FUZZED", 50)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.set_num_threads(2)
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def model(tokenizer):
    return shape(tokenizer)


@pytest.fixture(scope="module")
def tensors(model):
    return weights(model, torch.bfloat16)


def convert(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def refusal(*words):
    result = convert("from-meta", *words)
    assert isinstance(result.exception, UserError), result.output
    assert "\n" not in str(result.exception)
    assert not words[1].exists()
    assert not temporary_folder(words[1]).exists()
    return str(result.exception)


@pytest.mark.parametrize("num_files", [1, 2, 4, 8])
def test_metas_shards_are_huggingfaces_weights(tmp_path, model, tensors, tokenizer, num_files):
    """8 kv heads of 16: each of 8 files holds one."""
    source = write_meta(tmp_path / "meta", model, tensors, tokenizer, num_files)
    result = convert("from-meta", source, tmp_path / "own")
    assert result.exit_code == 0, result.output
    checkpoint = CheckpointReader(tmp_path / "own")
    checkpoint.verify()
    assert checkpoint.model == model.model_copy(update={"init_std": 0.02})
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read_stored(name), tensor), name
    receipt = json.loads((tmp_path / "own" / RECEIPT).read_text())
    assert (receipt["direction"], receipt["agrees"]) == ("from-meta", True)
    hashes = receipt["tensors"]["model.layers.1.self_attn.q_proj.weight"]
    files = [torch.load(source / f"consolidated.{number:02d}.pth") for number in range(num_files)]
    assert hashes["source"] == [sha256(file["layers.1.attention.wq.weight"]) for file in files]
    assert hashes["written"] == sha256(tensors["model.layers.1.self_attn.q_proj.weight"])
    assert receipt["origins"]["rope_theta"] == "rope_theta in params.json"


@torch.inference_mode()
def test_transformers_computes_the_same(tmp_path, model, tensors, tokenizer):
    """Meta -> megacode -> HuggingFace against a HuggingFace folder made of the same weights."""
    convert("from-meta", write_meta(tmp_path / "meta", model, tensors, tokenizer, 2), tmp_path / "own")
    assert convert("to-hf", tmp_path / "own", tmp_path / "hf").exit_code == 0
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert {name: sha256(tensor) for name, tensor in written.items()} == {n: sha256(t) for n, t in tensors.items()}
    straight = write_hf(tmp_path / "straight", model, tensors, tokenizer)
    tokens = torch.randint(model.vocabulary, (1, 40), generator=torch.Generator().manual_seed(1))
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        for folder in (straight, tmp_path / "hf")
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("params", "words", "theta", "positions", "origin"),
    [
        ({}, [], 1e6, 16384, "rope_theta in params.json"),
        ({"rope_theta": None}, [], 1e4, 4096, "the default of Meta's code, none in params.json"),
        ({"rope_theta": None}, ["--rope-theta", "1000000"], 1e6, 16384, "the option --rope-theta, none in params.json"),
        ({}, ["--max-positions", "2048"], 1e6, 2048, "rope_theta in params.json"),
    ],
)
def test_rotary_base_and_context_are_never_guessed(
    tmp_path, model, tensors, tokenizer, params, words, theta, positions, origin
):
    source = write_meta(tmp_path / "meta", model, tensors, tokenizer, 1, params)
    result = convert("from-meta", source, tmp_path / "own", *words)
    assert result.exit_code == 0, result.output
    found = CheckpointReader(tmp_path / "own").model
    assert (found.rope_theta, found.max_positions) == (theta, positions)
    receipt = json.loads((tmp_path / "own" / RECEIPT).read_text())
    assert receipt["origins"]["rope_theta"] == origin
    assert "max_positions" in receipt["origins"]


def test_rows_for_infilling(tmp_path, tokenizer):
    base = base_tokenizer(tokenizer, tmp_path / "base.model")
    model = shape(base)
    source = write_meta(tmp_path / "meta", model, weights(model, torch.float32), base, 2, {"rope_theta": None})
    result = convert("from-meta", source, tmp_path / "own", "--add-infilling")
    assert result.exit_code == 0, result.output
    checkpoint = CheckpointReader(tmp_path / "own")
    assert checkpoint.model.vocabulary == Tokenizer(checkpoint.tokenizer_path).vocabulary == model.vocabulary + 16
    assert convert("to-hf", tmp_path / "own", tmp_path / "hf").exit_code == 0


def test_a_tokenizer_from_elsewhere(tmp_path, model, tensors, tokenizer):
    source = write_meta(tmp_path / "meta", model, tensors, tokenizer, 1)
    (source / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    assert "--tokenizer" in refusal(source, tmp_path / "own")
    other = base_tokenizer(tokenizer, tmp_path / "base.model")
    assert "has 616 rows of the vocabulary and" in refusal(source, tmp_path / "own", "--tokenizer", other)
    words = ["--tokenizer", tmp_path / "tokenizer.model"]
    assert convert("from-meta", source, tmp_path / "own", *words).exit_code == 0


def respell(number, edit):
    def spoil(source):
        path = source / f"consolidated.{number:02d}.pth"
        content = torch.load(path)
        edit(content)
        torch.save(content, path)

    return spoil


def params(**values):
    def spoil(source):
        path = source / "params.json"
        content = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return spoil


Q = "layers.0.attention.wq.weight"
REFUSED = [
    (lambda source: (source / "consolidated.01.pth").unlink(), "feed-forward width of 192"),
    (lambda source: (source / "consolidated.00.pth").unlink(), "lacks consolidated.00.pth"),
    (lambda source: (source / "params.json").unlink(), "cannot read"),
    (params(use_scaled_rope=True), "use_scaled_rope = True is unknown"),
    (params(multiple_of=256), "feed-forward width of 256"),
    (params(norm_eps=None), "lacks norm_eps"),
    (params(vocab_size=32000), "vocab_size is 32000 and tok_embeddings.weight has 616 rows"),
    (params(n_kv_heads=4), "layers.0.attention.wk.weight in consolidated.00.pth has the shape [16, 64] instead"),
    (params(n_layers=3), "layers.2.attention_norm.weight is missing (and 8 more)"),
    (respell(1, lambda content: content.pop(Q)), f"{Q} is missing"),
    (respell(1, lambda content: content.update(more=torch.ones(1))), "more in consolidated.01.pth is not of the model"),
    (
        respell(1, lambda content: content.update({Q: content[Q].half()})),
        f"{Q} in consolidated.01.pth is fp16 instead of bf16",
    ),
    (respell(0, lambda content: content.update({Q: content[Q][1:].clone()})), "has the shape [31, 64] instead"),
    (respell(1, lambda content: content["norm.weight"].add_(1)), "norm.weight differs among the consolidated files"),
]


@pytest.mark.parametrize(("spoil", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_wrong_sources_are_refused(tmp_path, model, tensors, tokenizer, spoil, named):
    source = write_meta(tmp_path / "meta", model, tensors, tokenizer, 2)
    spoil(source)
    assert named in refusal(source, tmp_path / "own")


def swap(first, second):
    def spoil(source):
        (source / first).rename(source / "aside")
        (source / second).rename(source / first)
        (source / "aside").rename(source / second)

    return spoil


def listed(old, new):
    def spoil(source):
        path = source / "checklist.chk"
        path.write_text(path.read_text().replace(old, new))

    return spoil


NEXT = "consolidated.01.pth"
UNLISTED = [
    (swap("consolidated.00.pth", NEXT), f"00.pth is {NEXT} by the md5 in checklist.chk"),
    (respell(1, lambda content: content[Q].neg_()), f"{NEXT} has not the md5 that checklist.chk says; fetch it"),
    (params(max_seq_len=4096), "params.json has not the md5 that checklist.chk says; fetch"),
    (listed("  consolidated.01", " ../consolidated.01"), "checklist.chk: line 2 is none of md5sum's; fetch it again"),
    (listed("  consolidated.01", "  consolidated.02"), f"only the folder has {NEXT}; fetch checklist.chk again"),
    (lambda source: (source / NEXT).rename(source / "01.pth"), "a file is missing or of another model"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "named"), UNLISTED, ids=[named for _, named in UNLISTED])
def test_files_that_are_not_those_of_the_checklist(tmp_path, model, tensors, tokenizer, spoil, named):
    """Swapped files have tensors of the right names and shapes, and norms that all have whole."""
    source = write_meta(tmp_path / "meta", model, tensors, tokenizer, 2)
    write_checklist(source)
    spoil(source)
    assert named in refusal(source, tmp_path / "own")


def test_a_file_that_only_the_checklist_has(tmp_path, model, tensors, tokenizer):
    source = write_meta(tmp_path / "meta", model, tensors, tokenizer, 1)
    sums = write_checklist(source)
    sums.write_text(f"{sums.read_text()}{'0' * 32} *{NEXT}\n")
    assert f"only checklist.chk has {NEXT}; fetch that file again" in refusal(source, tmp_path / "own")


def test_the_receipt_says_whether_there_was_a_checklist(tmp_path, model, tensors, tokenizer):
    source = write_meta(tmp_path / "meta", model, tensors, tokenizer, 2)
    sums = write_checklist(source)
    sums.write_text(f"{sums.read_text()}{'0' * 32}  not_here.txt\n".replace("  params", " *params"))
    result = convert("from-meta", source, tmp_path / "own")
    assert (result.exit_code, result.stderr) == (0, "")
    receipt = json.loads((tmp_path / "own" / RECEIPT).read_text())
    names = "consolidated.00.pth, consolidated.01.pth, params.json, tokenizer.model"
    assert receipt["origins"]["files"] == f"md5 of {names} as in checklist.chk"
    assert receipt["warnings"] == []
    sums.unlink()
    swap("consolidated.00.pth", NEXT)(source)
    result = convert("from-meta", source, tmp_path / "swapped")
    warning = f"{source} has no checklist.chk, so the order of the files is not proved: two of its 2 consolidated files"
    assert result.stderr.startswith(f"warning: {warning}")
    assert result.stderr.count("\n") == 1
    receipt = json.loads((tmp_path / "swapped" / RECEIPT).read_text())
    assert receipt["origins"]["files"] == "no checklist.chk to compare with"
    assert [each.startswith(warning) for each in receipt["warnings"]] == [True]


def test_progress_of_the_checksums(tmp_path):
    (tmp_path / "a").write_bytes(bytes(40 * 2**20))
    (tmp_path / "b").write_bytes(b"12")
    sums = {name: hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in "ab"}
    told = []
    checklist.compare(tmp_path, sums, lambda *counts: told.append(counts))
    assert sorted(told) == told
    assert told[-1] == (40 * 2**20 + 2, 40 * 2**20 + 2)
    assert len(told) == 4


def test_an_option_does_not_contradict_the_file(tmp_path, model, tensors, tokenizer):
    source = write_meta(tmp_path / "meta", model, tensors, tokenizer, 1)
    assert "leave the option out" in refusal(source, tmp_path / "own", "--rope-theta", "10000")


def test_permutation():
    """Row 2i of a head goes to i, row 2i + 1 to i + head_dim / 2."""
    rows = torch.arange(24.0)[:, None]
    assert to_halves(rows, 3).flatten().tolist()[8:16] == [8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(to_pairs(to_halves(rows, 3), 3), rows)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [(4096, 256, None, 11008), (5120, 256, 1.0, 13824), (8192, 256, 1.0, 22016), (8192, 4096, 1.3, 28672)],
)
def test_feed_forward_width_of_released_models(dim, multiple_of, multiplier, width):
    assert feed_forward_width(dim, multiple_of, multiplier) == width
