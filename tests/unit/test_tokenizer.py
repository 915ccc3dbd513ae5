"""megacode.data.tokenizer: training, the appended rows, and what comes back from encoding."""

import argparse
import dataclasses
import importlib
import inspect
import json
import pickle
import random
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2

from megacode.data import engines
from megacode.data.tokenizer import NUM_APPENDED_ROWS, Tokenizer, find_fault, probes, train
from megacode.errors import UserError

TEXTS = [inspect.getsource(module) for module in (argparse, json.decoder, textwrap)]
SPECIALS = ["<unk>", "<s>", "</s>", "<0x0A>", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "<step>", "<reserved_0>"]
NAMES = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(0, 256, 5)), "<", ">", " ", "\n", "a", "0", "é"]
ANY_CODES = [*range(0x500), *range(0x2000, 0x3100), 0x4E2D, 0xFFFD, *range(0x1F600, 0x1F650), 0x10FFFF]
# Any Unicode text, with the things that have been trouble before made frequent.
ANY_TEXT = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from([*SPECIALS, " ", "    ", "▁", "\r\n", "\0", "😀"])
).map("".join)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train(TEXTS, path, 1000)
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer(path)


def test_rows_stand_where_code_llama_has_them(tokenizer):
    assert tokenizer.vocabulary == 1000 + NUM_APPENDED_ROWS
    assert [tokenizer.piece(row) for row in (0, 1, 2)] == ["<unk>", "<s>", "</s>"]
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert (tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id) == (1007, 1008, 1009, 1010)
    names = {1007: "▁<PRE>", 1008: "▁<SUF>", 1009: "▁<MID>", 1010: "▁<EOT>", 1015: "<step>"}
    assert {row: tokenizer.piece(row) for row in names} == names
    assert all(tokenizer.is_control(row) for row in range(1000, 1016))
    assert tokenizer.has_infilling


def test_line_ends_and_indentation_are_pieces(tokenizer):
    pieces = {tokenizer.piece(row) for row in range(tokenizer.vocabulary)}
    assert {"▁" * 4, "▁" * 8, "\n", ":\n"} <= pieces


def test_equal_texts_give_an_equal_file(path, tmp_path):
    train(iter(TEXTS), tmp_path / "again.model", 1000)
    assert (tmp_path / "again.model").read_bytes() == path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["again.model"]


def test_a_document_with_the_trainers_reserved_character_still_counts(tmp_path):
    train([TEXTS[0] + "▅"], tmp_path / "t.model", 500)
    assert Tokenizer(tmp_path / "t.model").vocabulary == 516


@given(ANY_TEXT)
def test_every_text_comes_back(tokenizer, text):
    back = text.replace("▁", " ")
    assert tokenizer.decode(tokenizer.encode(text)) == back
    assert tokenizer.decode_continuation(tokenizer.encode_continuation(text)) == back
    assert not any(tokenizer.is_control(row) for row in tokenizer.encode(text) + tokenizer.encode_continuation(text))


@given(ANY_TEXT)
def test_continuation_is_code_llamas_encoding_behind_a_character(tokenizer, text):
    # The reference encodes a text without dummy prefix behind a rare character. Here that is several byte tokens, of
    # which no learned piece has any part, so the rest is encoded as if alone.
    marker = tokenizer.encode("☺")
    encoded = tokenizer.encode("☺" + text)
    assert encoded[: len(marker)] == marker
    assert encoded[len(marker) :] == tokenizer.encode_continuation(text)


@pytest.mark.parametrize("special", SPECIALS)
def test_text_that_spells_a_piece_does_not_become_it(tokenizer, path, special):
    own = SentencePieceProcessor(model_file=str(path)).piece_to_id(special)
    assert own != 0 or special == "<unk>", "the piece must exist for the test to mean anything"
    for text in (special, f" {special}", f"x{special}y", special.removeprefix("▁")):
        assert own not in tokenizer.encode(text)
        assert own not in tokenizer.encode_continuation(text)


def test_find_fault_passes_a_good_model_and_names_what_is_wrong_with_a_bad_one(tokenizer, path, tmp_path):
    assert find_fault(tokenizer, 300) is None
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    model.normalizer_spec.name = "nfkc"
    model.normalizer_spec.remove_extra_whitespaces = True
    (tmp_path / "bad.model").write_bytes(model.SerializeToString())
    assert "comes back as" in find_fault(Tokenizer(tmp_path / "bad.model"), 300)


def test_infilling_pieces_of_another_type_are_shut_off_from_text(path, tmp_path):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    model.pieces[1007].type = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    (tmp_path / "user.model").write_bytes(model.SerializeToString())
    assert 1007 in SentencePieceProcessor(model_file=str(tmp_path / "user.model")).encode("<PRE>")
    assert 1007 not in Tokenizer(tmp_path / "user.model").encode("<PRE>")


def test_a_model_without_infilling_pieces(path, tmp_path):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    del model.pieces[1000:]
    (tmp_path / "base.model").write_bytes(model.SerializeToString())
    tokenizer = Tokenizer(tmp_path / "base.model")
    assert (tokenizer.vocabulary, tokenizer.has_infilling, tokenizer.eot_id) == (1000, False, None)


def test_training_says_what_to_mend(tmp_path):
    output = tmp_path / "t.model"
    with pytest.raises(UserError, match=r"at most \d+ pieces or give more text"):
        train(["def f(): pass\n"], output, 4096)
    with pytest.raises(UserError, match=r"too few .* at least \d+"):
        train(TEXTS, output, 260)
    with pytest.raises(UserError, match="no text"):
        train([""], output, 300)

    def broken():
        yield TEXTS[0]
        raise UserError("the input's own message")

    with pytest.raises(UserError, match=r"^the input's own message$"):
        train(broken(), output, 300)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, b"", b"junk", b"\n\0"])
def test_a_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "t.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"t\.model"):
        Tokenizer(path)


def test_the_fast_engine_gives_sentencepieces_ids_over_100_000_texts(tokenizer, path):
    engine, oracle = tokenizer.engine, Tokenizer(path, oracle=True).engine
    assert engine.name.startswith("fastokens")
    assert oracle.name.startswith("sentencepiece")
    generator = random.Random(1)
    source = "".join(TEXTS)
    texts = [
        *probes(tokenizer, 50_000),
        *(source[start : start + generator.randrange(80)] for start in generator.choices(range(len(source)), k=30_000)),
        *("".join(generator.choices(NAMES, k=generator.randrange(6))) for _ in range(10_000)),
        *("".join(map(chr, generator.choices(ANY_CODES, k=generator.randrange(20)))) for _ in range(10_000)),
    ]
    assert len(texts) == 100_000
    for text in texts:
        assert np.array_equal(engine.document(text), oracle.document(text)), text
        assert np.array_equal(engine.continuation(text), oracle.continuation(text)), text


@pytest.mark.parametrize("change", ["nfkc", "user-defined piece", "no dummy prefix"])
def test_a_model_that_the_fast_engine_cannot_express_is_sentencepieces(path, tmp_path, change):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    if change == "nfkc":
        trained = tmp_path / "nfkc.model"
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "nfkc"), model_type="bpe", vocab_size=400,
            byte_fallback=True, normalization_rule_name="nfkc", minloglevel=3, max_sentence_length=1 << 20,
        )  # fmt: skip
        model.ParseFromString(trained.read_bytes())
    elif change == "no dummy prefix":
        model.normalizer_spec.add_dummy_prefix = False
    else:
        model.pieces[900].type = model.pieces[900].USER_DEFINED
    (tmp_path / "t.model").write_bytes(model.SerializeToString())
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert tokenizer.engine.name.startswith("sentencepiece")
    assert "fastokens needs" in tokenizer.engine.reason
    own = SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert tokenizer.encode(TEXTS[0][:500]) == own.encode(TEXTS[0][:500])


def test_an_engine_that_another_process_has_found_is_not_probed(tokenizer, path):
    def asked():
        raise AssertionError("probed")
        yield

    for found in (tokenizer.engine, Tokenizer(path, oracle=True).engine):
        engine = engines.fastest(tokenizer.model, asked(), found.name)
        assert engine.name == found.name
        assert np.array_equal(engine.document(TEXTS[0]), found.document(TEXTS[0]))
        assert pickle.loads(pickle.dumps(Tokenizer(path, known=found.name))).engine.name == found.name
    with pytest.raises(AssertionError, match="probed"):
        engines.fastest(tokenizer.model, asked(), "fastokens of another version")


def test_an_engine_that_gives_other_ids_or_is_absent_is_not_taken(tokenizer, monkeypatch):
    fast = engines.fastest(tokenizer.model, [])

    def wrong(text):
        return fast.document(text)[::-1]

    monkeypatch.setattr(engines, "_fastokens", lambda model: dataclasses.replace(fast, document=wrong))
    engine = engines.fastest(tokenizer.model, probes(tokenizer))
    assert engine.name.startswith("sentencepiece")
    assert "other ids" in engine.reason
    monkeypatch.setattr(engines, "_fastokens", lambda model: importlib.import_module("no_such_package"))
    assert "is not installed" in engines.fastest(tokenizer.model, []).reason


def test_a_tokenizer_travels_to_another_process(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.sha256 == tokenizer.sha256
    assert again.encode("def f():") == tokenizer.encode("def f():")


@given(st.lists(st.integers(0, 1015), max_size=12))
def test_decoding_any_ids_is_sentencepieces(tokenizer, path, ids):
    assert tokenizer.decode_continuation(ids) == engines.processor(tokenizer.model, dummy_prefix=False).decode(ids)


def test_half_a_surrogate_pair_is_no_text(tokenizer, path):
    for each in (tokenizer, Tokenizer(path, oracle=True)):
        with pytest.raises(UnicodeEncodeError):
            each.encode("a\ud800b")


def test_text_that_spells_a_byte_piece_stays_text(tokenizer, path):
    oracle = Tokenizer(path, oracle=True)
    for text in ("<0x35>", "a <0x0A>\n<0xFF>", "x = '<0x41>'\n", "<0x4", "0x41>"):
        assert tokenizer.encode(text) == oracle.encode(text)
        assert tokenizer.encode_continuation(text) == oracle.encode_continuation(text)
