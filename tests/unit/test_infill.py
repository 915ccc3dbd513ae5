"""megacode.data.infill: the layouts of infilling documents, where they are cut, and that nothing is lost."""

import argparse
import inspect
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import CodeLlamaTokenizer

from megacode.data.counter import Purpose, draw, key_of
from megacode.data.infill import infill, infilling_document, infilling_prompt
from megacode.data.tokenizer import Tokenizer, train
from megacode.data.tokenizer_json import merges, vocabulary
from megacode.errors import UserError

TEXT = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(["    ", " ", "▁", "\r\n", "\0", "😀", "▁<MID>"])
).map("".join)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train([inspect.getsource(argparse)], path, 800)
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer(path)


def divide(ids, *separators):
    """Cut a list at single ids that must each occur once, in this order."""
    parts = []
    for separator in separators:
        assert ids.count(separator) == 1
        place = ids.index(separator)
        parts.append(ids[:place])
        ids = ids[place + 1 :]
    return [*parts, ids]


def test_layouts_by_the_formulas(path, tokenizer):
    """Against SentencePiece itself; the text without dummy prefix is encoded as Code Llama's reference does it."""
    processor = SentencePieceProcessor(model_file=str(path))
    marker = len(processor.encode("☺"))

    def enc0(text):
        return processor.encode("☺" + text)[marker:]

    prefix, middle, suffix = "def f(a):\n    ret", "urn a + 1", "\n\nprint(f(1))\n"
    bos, pre, suf, mid, eot, eos = 1, 807, 808, 809, 810, 2
    psm = [bos, pre, *processor.encode(prefix), suf, *enc0(suffix), mid, *enc0(middle), eot, eos]
    spm = [bos, pre, suf, *enc0(suffix), mid, *processor.encode(prefix + middle), eot, eos]
    assert infilling_document(prefix, middle, suffix, tokenizer) == psm
    assert infilling_document(prefix, middle, suffix, tokenizer, suffix_first=True) == spm
    assert infilling_prompt(prefix, suffix, tokenizer) == psm[: psm.index(mid) + 1]
    assert infilling_prompt(prefix, suffix, tokenizer, True) == spm[: spm.index(mid) + 1] + processor.encode(prefix)


@given(TEXT, TEXT, TEXT)
def test_psm_holds_the_whole_text(tokenizer, prefix, middle, suffix):
    ids = infilling_document(prefix, middle, suffix, tokenizer)
    assert (ids[0], ids[-2:]) == (tokenizer.bos, [tokenizer.eot_id, tokenizer.eos])
    head, first, last, moved, _ = divide(
        ids, tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id
    )
    assert head == [tokenizer.bos]
    text = tokenizer.decode(first) + tokenizer.decode_continuation(moved) + tokenizer.decode_continuation(last)
    assert text == (prefix + middle + suffix).replace("▁", " ")


@given(TEXT, TEXT, TEXT)
def test_spm_holds_the_whole_text(tokenizer, prefix, middle, suffix):
    ids = infilling_document(prefix, middle, suffix, tokenizer, suffix_first=True)
    head, nothing, last, body, end = divide(
        ids, tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id
    )
    assert (head, nothing, end) == ([tokenizer.bos], [], [tokenizer.eos])
    assert tokenizer.decode(body) + tokenizer.decode_continuation(last) == (prefix + middle + suffix).replace("▁", " ")


@pytest.mark.parametrize("suffix_first", [False, True])
def test_with_no_prefix_both_orders_have_the_suffix_in_the_same_place(tokenizer, suffix_first):
    ids = infilling_document("", "abc", "def", tokenizer, suffix_first=suffix_first)
    assert ids[:3] == [tokenizer.bos, tokenizer.prefix_id, tokenizer.suffix_id]


def cut_points(tokenizer, document, text="0123456789", **changes):
    arguments = {"seed": 1, "epoch": 2} | changes
    words = draw(key_of(arguments["seed"], arguments["epoch"], Purpose.WHERE_TO_CUT), document, 3)
    ids, _ = infill(text, words, tokenizer, 0.0)
    parts = divide(ids, tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id)
    prefix = tokenizer.decode(parts[1])
    return len(prefix), len(prefix) + len(tokenizer.decode_continuation(parts[3]))


def test_cuts_are_two_uniform_draws_over_the_characters(tokenizer):
    num_documents, places = 8000, 11  # ten characters have eleven places to cut
    found = Counter(cut_points(tokenizer, document) for document in range(num_documents))
    assert set(found) == {(i, j) for i in range(places) for j in range(i, places)}
    # Two equal draws: 1 of 121; two different ones, in either order: 2 of 121.
    chi2 = sum(
        (found[i, j] - expected) ** 2 / expected
        for i in range(places)
        for j in range(i, places)
        for expected in [num_documents * (1 if i == j else 2) / places**2]
    )
    assert chi2 < 106, "66 cells, 65 degrees of freedom: more than 106 has probability 0.1 %"


def test_a_cut_is_a_function_of_seed_epoch_and_document(tokenizer):
    assert cut_points(tokenizer, 7) == cut_points(tokenizer, 7)
    for change in ({"seed": 2}, {"epoch": 3}, {"seed": 2**60}):
        assert [cut_points(tokenizer, i) for i in range(20)] != [cut_points(tokenizer, i, **change) for i in range(20)]


def test_share_of_suffix_first(tokenizer):
    def share(rate, num=2000):
        rows = (infill("abc", draw(key_of(0, 0, Purpose.WHERE_TO_CUT), i, 3), tokenizer, rate)[0] for i in range(num))
        # A PSM document with an empty prefix begins like an SPM one.
        orders = [row[2] == tokenizer.suffix_id for row in rows]
        return sum(orders) / num

    empty_prefix = 7 / 16  # either of two draws from four places is 0
    assert share(1.0) == 1
    assert share(0.0) == pytest.approx(empty_prefix, abs=0.034), "three standard deviations of 2000 draws are 0.033"
    assert share(0.5) == pytest.approx(0.5 + empty_prefix / 2, abs=0.034)


def test_without_infilling_pieces(path, tmp_path):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    del model.pieces[800:]
    (tmp_path / "base.model").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"base\.model has no infilling pieces"):
        infilling_prompt("a", "b", Tokenizer(tmp_path / "base.model"))


def test_layout_of_the_golden_vector(tokenizer):
    """Code Llama's own first infilling prompt, as its reference code encodes it, has these pieces in these places:

    BOS, PRE, the prefix with its dummy space, a lone space last of it, SUF, and the suffix without one: it begins with
    the line end.
    """
    prefix, suffix = 'def remove_non_ascii(s: str) -> str:\n    """ ', "\n    return result\n"
    ids = infilling_prompt(prefix, suffix, tokenizer)
    bos, pre, *rest = ids
    place = ids.index(tokenizer.suffix_id)
    assert [bos, pre, ids[place], rest[-1]] == [1, 807, 808, 809], "base + 7, + 8, + 9"
    assert tokenizer.decode_continuation(ids[2:place]) == " " + prefix
    assert tokenizer.piece(ids[place - 1]) == "▁"
    assert tokenizer.decode_continuation(ids[place + 1 : -1]) == suffix
    assert not tokenizer.piece(ids[place + 1]).startswith("▁")


# Without names of special pieces: text that spells them stays text here and becomes those pieces in transformers.
TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1)
    | st.sampled_from(["    ", "def ", "\r\n", "😀", "a < b"]),
    min_size=1,
).map("".join)


@pytest.fixture(scope="module")
def oracle(path):
    """transformers' CodeLlamaTokenizer of the same pieces. Its default (5.23) puts the dummy space before the suffix as
    well, which the golden vector has not: hence no automatic one; it puts that of the prefix there by itself, even
    before an empty one, of which SentencePiece, and so Code Llama's own code, makes nothing.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return CodeLlamaTokenizer(vocab=vocabulary(proto), merges=merges(proto), unk_token="<unk>", add_prefix_space=False)


@settings(max_examples=200)
@given(TEXTS, TEXTS, st.booleans())
def test_prompts_are_those_of_transformers(tokenizer, oracle, prefix, suffix, suffix_first):
    ids = oracle(prefix, suffix=suffix, suffix_first=suffix_first)["input_ids"]
    assert infilling_prompt(prefix, suffix, tokenizer, suffix_first) == ids


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_cuts_never_break_a_character(tokenizer, text, first, second):
    """Each part is UTF-8 by itself: byte pieces of one character never lie on both sides of a cut."""
    ids, _ = infill(text, [first, second, 2**64 - 1], tokenizer, 0.5)
    parts = divide(ids, tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id)
    for part in parts:
        raw = b"".join(
            bytes.fromhex(piece[3:5]) if len(piece) == 6 and piece.startswith("<0x") else piece.encode()
            for piece in (tokenizer.piece(row) for row in part if not tokenizer.is_control(row))
        )
        raw.decode()
