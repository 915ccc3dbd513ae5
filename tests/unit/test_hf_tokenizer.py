"""The tokenizer that transformers loads gives SentencePiece's ids."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from support.exports import train_tokenizer
from transformers import AutoTokenizer

from megacode.checkpoint.convert.hf_tokenizer import FUZZ, compare_tokenizer, fuzzed_texts, write_tokenizer
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError

PIECES = st.sampled_from(sorted({part for parts in FUZZ.values() for part in parts}))
ANY = st.characters(exclude_categories=["Cs"])  # a lone surrogate is no text: both sides refuse it
TEXTS = st.lists(PIECES | ANY | st.sampled_from(["def f", "self.", "):\n        return "]), max_size=40).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    model = train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    write_tokenizer(model, folder, max_positions=2048)
    # AutoTokenizer looks at the model's type as well: with it, the class must be the plain one too.
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def sentencepiece(folder):
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@given(text=TEXTS)
@example(text="")
@example(text=" ")
@example(text="\u2581x")
@example(text="  leading\r\n\x00 \u0301 12345678901234567890" + " " * 5000 + "\U0001f600")
@example(text=" <s> </s>\u2581<PRE><0x0A>")
def test_ids_and_text_are_sentencepieces(loaded, sentencepiece, text):
    ids = sentencepiece.encode(text)
    assert loaded(text, add_special_tokens=False, split_special_tokens=True).input_ids == ids
    assert loaded.decode(ids) == sentencepiece.decode(ids)
    if not any(piece in text for piece in loaded.all_special_tokens):
        assert loaded(text, add_special_tokens=False).input_ids == ids
        assert loaded(text).input_ids == [1, *ids]


def test_without_config_the_same(folder, tmp_path):
    write_tokenizer(folder / "tokenizer.model", tmp_path, max_positions=2048)
    assert compare_tokenizer(Tokenizer(folder / "tokenizer.model"), tmp_path, fuzzed_texts(500, seed=5)) == []


@pytest.mark.parametrize("character", ["-", "=", " ", "\n", "#", "a", "\u2581", "_", '"', "\t", "\x00"])
def test_runs_of_one_character(loaded, sentencepiece, character):
    """Pieces of one repeated character split in many ways: merges of equal rank would show here."""
    for length in range(1, 130):
        for text in (character * length, f"x{character * length}y", f"({character * length} "):
            assert loaded(text, add_special_tokens=False).input_ids == sentencepiece.encode(text)


def test_special_pieces(loaded, folder):
    tokenizer = Tokenizer(folder / "tokenizer.model")
    base = tokenizer.vocabulary - 16
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded.pad_token is None
    assert loaded.model_max_length == 2048
    assert len(loaded) == tokenizer.vocabulary
    assert sorted(loaded.all_special_ids) == [0, 1, 2, *range(base, base + 16)]
    spelled = loaded("a\u2581<PRE>b<step></s>", add_special_tokens=False).input_ids
    assert [row for row in spelled if row in loaded.all_special_ids] == [base + 7, base + 15, 2]
    assert loaded.decode([1, *spelled], skip_special_tokens=True) == "a b"
    assert loaded.convert_tokens_to_ids(["\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>"]) == [
        tokenizer.prefix_id,
        tokenizer.suffix_id,
        tokenizer.middle_id,
        tokenizer.eot_id,
    ]


def test_saved_again_the_same(loaded, sentencepiece, tmp_path):
    """Who loads, fine-tunes and saves keeps the ids."""
    loaded.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in fuzzed_texts(200, seed=1):
        assert again(text, split_special_tokens=True).input_ids == [1, *sentencepiece.encode(text)]


def test_infilling_pieces_of_another_type_are_special(folder, tmp_path):
    """Code Llama's own file has them as normal pieces."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    for piece in proto.pieces:
        if piece.piece in ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>"):
            piece.type = piece.NORMAL
    (tmp_path / "normal.model").write_bytes(proto.SerializeToString())
    write_tokenizer(tmp_path / "normal.model", tmp_path, 2048)
    reference = Tokenizer(tmp_path / "normal.model")
    assert compare_tokenizer(reference, tmp_path, fuzzed_texts(500, seed=2)) == []


def without_bytes(proto):
    proto.trainer_spec.byte_fallback = False
    for piece in proto.pieces:
        if piece.type == piece.BYTE:
            piece.type = piece.UNUSED


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without_bytes, "byte fallback"),
        (lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True), "kept whitespace"),
        (lambda proto: setattr(proto.normalizer_spec, "add_dummy_prefix", False), "dummy prefix"),
        (lambda proto: setattr(proto.trainer_spec, "model_type", 1), "model_type BPE"),
        (lambda proto: setattr(proto.pieces[300], "type", 4), "user-defined"),
    ],
)
def test_what_cannot_be_equal_is_refused(folder, tmp_path, change, named):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    change(proto)
    (tmp_path / "other.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=named):
        write_tokenizer(tmp_path / "other.model", tmp_path, 2048)


def test_fuzzed_texts_are_a_function_of_the_seed():
    assert fuzzed_texts(50, seed=3) == fuzzed_texts(50, seed=3)
    assert fuzzed_texts(50, seed=3) != fuzzed_texts(50, seed=4)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda tokenizer: tokenizer["model"]["merges"].pop(0), "the ids of"),
        (lambda tokenizer: tokenizer["normalizer"]["normalizers"].pop(0), "the ids of"),
        (lambda tokenizer: tokenizer["decoder"]["decoders"].pop(), "the text that comes back"),
        (lambda tokenizer: tokenizer["model"]["vocab"].update({"one more": 616}), "rows and SentencePiece"),
    ],
)
def test_comparison_finds(folder, tmp_path, spoil, found):
    write_tokenizer(folder / "tokenizer.model", tmp_path, 2048)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    spoil(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    differences = compare_tokenizer(Tokenizer(folder / "tokenizer.model"), tmp_path, fuzzed_texts(300, seed=0))
    assert any(found in difference for difference in differences)


def test_comparison_is_quiet_on_texts_beyond_the_context(folder, capfd):
    assert compare_tokenizer(Tokenizer(folder / "tokenizer.model"), folder, ["x = 1\n" * 2000]) == []
    assert "longer than" not in capfd.readouterr().err
