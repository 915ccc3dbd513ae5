"""megacode.data.joints: a text that is tokenized in stretches gets the ids of the whole."""

import argparse
import inspect
import json
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from megacode.data import engines, joints
from megacode.data.joints import in_stretches
from megacode.data.tokenizer import Tokenizer, train

TEXTS = [inspect.getsource(module) for module in (argparse, json.decoder, textwrap)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train(TEXTS, path, 1000)
    return Tokenizer(path)


def stretches_of(tokenizer, stretch):
    """An engine in stretches that notes what it was given."""
    oracle, given_texts = engines.sentencepiece(tokenizer.model), []

    def noting(encode):
        return lambda text: (given_texts.append(text), encode(text))[1]

    noted = engines.Engine("", "", noting(oracle.document), noting(oracle.continuation))
    return in_stretches(noted, tokenizer.model, stretch), given_texts, oracle


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
        | st.sampled_from(["    ", "▁", " ", "\n", "def ", "return", "self.", "<s>", "<0x0A>", "\r\n", "😀"])
    ).map("".join)
    | st.integers(0, len(TEXTS[0]) - 200).map(lambda start: TEXTS[0][start : start + 200]),
    st.integers(1, 20),
)
def test_ids_are_those_of_the_whole(tokenizer, text, stretch):
    engine, given_texts, oracle = stretches_of(tokenizer, stretch)
    assert engine.document(text).tolist() == oracle.document(text).tolist()
    assert "".join(given_texts) == text
    assert engine.continuation(text).tolist() == oracle.continuation(text).tolist()


def test_code_has_joints_enough(tokenizer):
    engine, given_texts, _ = stretches_of(tokenizer, 1000)
    engine.document(TEXTS[0])
    assert max(map(len, given_texts)) < 1100
    assert engine.document("").size == 0


def test_a_text_without_joints_stays_whole(tokenizer):
    engine, given_texts, oracle = stretches_of(tokenizer, 10)
    text = "    " * 30
    assert engine.document(text).tolist() == oracle.document(text).tolist()
    assert given_texts == [text]


@pytest.mark.parametrize("run", range(1, 40))
def test_a_joint_behind_a_long_run_is_found(tokenizer, monkeypatch, run):
    """However the run lies to what is looked up at once."""
    monkeypatch.setattr(joints, "_FIRST", 1)
    monkeypatch.setattr(joints, "_MOST", 8)
    engine, given_texts, oracle = stretches_of(tokenizer, 5)
    text = " " * (5 + run) + "\x01" + " " * 20 + "\x01"
    assert engine.document(text).tolist() == oracle.document(text).tolist()
    assert given_texts[0] == " " * (5 + run)


def test_texts_without_joints_are_told(tokenizer, monkeypatch):
    monkeypatch.setattr(joints, "LONGEST", 100)
    monkeypatch.setattr(joints, "STRETCH", 10)
    assert joints.is_unbroken(" " * 101, tokenizer.model)
    assert joints.is_unbroken(TEXTS[0] + " " * 101, tokenizer.model)
    assert not joints.is_unbroken(" " * 100, tokenizer.model)
    assert not joints.is_unbroken(" " * 50 + "\x01" + " " * 50, tokenizer.model)
    assert not joints.is_unbroken(TEXTS[0], tokenizer.model)


def test_other_models_are_left_alone(tokenizer):
    model = sentencepiece_model_pb2.ModelProto()
    model.CopyFrom(tokenizer.model)
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    oracle = engines.sentencepiece(tokenizer.model)
    assert in_stretches(oracle, model) is oracle
    assert not joints.is_unbroken(" " * (joints.LONGEST + 1), model)
    assert joints.is_unbroken(" " * (joints.LONGEST + 1), tokenizer.model)


def test_long_texts_are_given_in_stretches_by_default(tokenizer):
    text = TEXTS[0] * (1 + (1 << 20) // len(TEXTS[0]))
    oracle = Tokenizer(tokenizer.path, oracle=True)
    assert tokenizer.encode_array(text).tolist() == oracle.encode_array(text).tolist()
    assert tokenizer.engine.document.__qualname__.startswith("in_stretches")
    assert not oracle.engine.document.__qualname__.startswith("in_stretches")
