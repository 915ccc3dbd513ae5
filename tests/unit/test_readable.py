"""megacode.data.readable: text comes back from tokens part by part; and how a terminal is given it."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.shards import SOURCE

from megacode.data.infill import infilling_document
from megacode.data.readable import Run, runs
from megacode.data.tokenizer import Tokenizer, train
from megacode.tools.data.painting import paint

TEXT = st.lists(st.sampled_from([*"ab \n\té中😀<>s/", "def ", "<PRE>", "</s>"]), max_size=12).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train([SOURCE], path, 600)
    return Tokenizer(path)


def read(ids, kind, tokenizer, cuts=None, loss=None):
    return runs(np.array(ids), kind, cuts, np.ones(len(ids), bool) if loss is None else np.array(loss), tokenizer)


def of(found, role):
    return "".join(run.text for run in found if run.role == role)


@given(TEXT, TEXT, TEXT, st.booleans())
@example(" ", "", "", True)
@example("", " ", " ", False)
@example("", "", "", True)
def test_the_parts_of_an_infilling_document(tokenizer, prefix, middle, suffix, suffix_first):
    ids = infilling_document(prefix, middle, suffix, tokenizer, suffix_first=suffix_first)
    found = read(ids, "SPM" if suffix_first else "PSM", tokenizer, (len(prefix), len(prefix + middle)))
    assert [of(found, role) for role in ("prefix", "middle", "suffix", "text")] == [prefix, middle, suffix, ""]
    order = "<s><PRE><SUF><MID><EOT></s>"
    assert of(found, "marker") == order
    whole = "".join(run.text for run in found)
    if suffix_first:
        assert whole == f"<s><PRE><SUF>{suffix}<MID>{prefix}{middle}<EOT></s>"
    else:
        assert whole == f"<s><PRE>{prefix}<SUF>{suffix}<MID>{middle}<EOT></s>"
    assert all(run.loss for run in found)


@given(TEXT, st.integers(0, 40), st.integers(0, 40))
def test_loss_divides_a_document_and_no_text_is_lost(tokenizer, text, start, stop):
    ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
    loss = [not start <= place < stop for place in range(len(ids))]
    found = read(ids, "whole", tokenizer, loss=loss)
    assert of(found, "text") == text
    assert "".join(run.text for run in found) == f"<s>{text}</s>"
    first, last = found[0], found[-1]
    assert (first.loss, last.loss) == (loss[0], loss[-1])
    if all(loss) or not any(loss):
        assert {run.loss for run in found} == {loss[0]}


def test_a_piece_that_begins_and_ends_within_a_character(tokenizer):
    ids = tokenizer.encode_continuation("😀 x 😀")
    assert len(ids) > 8, "the tokenizer knows its bytes only"
    found = read(ids[2:-1], "cut", tokenizer)
    assert of(found, "text") == "\ufffd\ufffd x \ufffd", "two bytes of the first one, three of the second"
    assert [run.text for run in read(tokenizer.encode_continuation(" a"), "cut", tokenizer)] == [" a"]
    half = len(ids) // 4
    parts = read(ids[:4], "cut", tokenizer, loss=[False] * half + [True] * (4 - half))
    assert [(run.text, run.loss) for run in parts] == [("😀", True)], "it belongs to the run in which it ends"


def test_padding_and_its_colours(tokenizer):
    (found,) = read([0, 0, 0], "padding", tokenizer)
    assert found == Run("<3 tokens of padding>", "padding", False)
    shown = [Run("a\n\tb\x1b[31m\x9b\x7f\r", "prefix", True), Run("c", "text", True), Run("d", "middle", False)]
    assert paint(shown, colours=False) == "a\n\tb␛[31m\ufffd␡␍cd", "no document speaks to the terminal"
    assert paint(shown[1:], colours=True) == "c\x1b[32;2md\x1b[0m"
    assert paint([Run("x", "marker", False)], colours=True) == "\x1b[1;33;2mx\x1b[0m"
