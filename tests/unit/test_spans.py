"""megacode.data.spans: the bytes of the format, merging, and refusing damaged files."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacode.data import spans as spans_module
from megacode.data.spans import Spans, SpansWriter, merge
from megacode.errors import UserError

DOCUMENTS = [[(0, 2), (4, 5)], [], [(1, 7)]]


def write(prefix, documents=DOCUMENTS):
    with SpansWriter(prefix) as writer:
        for document in documents:
            writer.add_document(document)


def read(prefix, num_documents):
    spans = Spans(prefix, num_documents)
    return [[tuple(pair) for pair in spans.of(i).tolist()] for i in range(num_documents)]


def test_bytes(tmp_path):
    write(tmp_path / "a.b")
    expected = b"MEGASPAN" + struct.pack("<3Q4q6i", 1, 3, 3, 0, 2, 2, 3, 0, 2, 4, 5, 1, 7)
    assert (tmp_path / "a.b.spans").read_bytes() == expected
    assert os.listdir(tmp_path) == ["a.b.spans"]
    assert read(tmp_path / "a.b", 3) == DOCUMENTS
    Spans(tmp_path / "a.b", 3).verify(np.array([5, 1, 7]))
    with pytest.raises(UserError, match="a span of document 2 ends at token 7 and the document has 6"):
        Spans(tmp_path / "a.b", 3).verify(np.array([5, 1, 6]))


def test_no_spans_no_file(tmp_path):
    write(tmp_path / "s")
    write(tmp_path / "s", [[], []])
    assert os.listdir(tmp_path) == [], "the spans of the shard that stood there before must not stay"
    assert read(tmp_path / "s", 2) == [[], []]
    assert Spans(tmp_path / "s", 2).num_spans == 0


def test_an_exception_leaves_nothing_behind(tmp_path):
    write(tmp_path / "s")

    def fail():
        with SpansWriter(tmp_path / "s") as writer:
            writer.add_document([(0, 1)])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path) == ["s.spans"]
    assert read(tmp_path / "s", 3) == DOCUMENTS


DOCUMENT = st.lists(st.integers(1, 5), max_size=8).map(
    lambda steps: list(zip(np.cumsum(steps)[::2].tolist(), np.cumsum(steps)[1::2].tolist(), strict=False))
)


@given(st.lists(st.lists(DOCUMENT, max_size=6), max_size=5), st.integers(1, 3))
def test_merging(tmp_path_factory, parts, block):
    folder = tmp_path_factory.mktemp("spans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans_module, "_BLOCK", block)  # so that the blocks' seams are met
        for number, documents in enumerate(parts):
            write(folder / str(number), documents)
        merge([(folder / str(number), len(documents)) for number, documents in enumerate(parts)], folder / "merged")
    whole = [document for documents in parts for document in documents]
    write(folder / "whole", whole)
    assert read(folder / "merged", len(whole)) == whole
    assert (folder / "merged.spans").exists() == (folder / "whole.spans").exists() == any(whole)
    if any(whole):
        assert (folder / "merged.spans").read_bytes() == (folder / "whole.spans").read_bytes()


def test_spans_must_rise(tmp_path):
    for wrong in ([(1, 1)], [(2, 1)], [(-1, 1)], [(0, 2), (1, 3)], [(4, 5), (0, 2)]):
        with pytest.raises(AssertionError), SpansWriter(tmp_path / "s") as writer:
            writer.add_document(wrong)


def test_foreign_and_truncated_files(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(UserError, match=r"s\.spans is of 3 documents and the shard has 4"):
        Spans(tmp_path / "s", 4)
    data = (tmp_path / "s.spans").read_bytes()
    for wrong, message in (
        (b"", "is no file of loss spans"),
        (b"X" + data[1:], "is no file of loss spans"),
        (data[:8] + b"\2" + data[9:], "has version 2"),
        (data[:-1], "truncated"),
        (data + b"\0", "truncated or damaged"),
    ):
        (tmp_path / "s.spans").write_bytes(wrong)
        with pytest.raises(UserError, match=message):
            Spans(tmp_path / "s", 3)


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_byte_is_no_other_error(tmp_path_factory, place, value):
    folder = tmp_path_factory.mktemp("spans")
    write(folder / "s")
    data = bytearray((folder / "s.spans").read_bytes())
    data[place % len(data)] = value
    (folder / "s.spans").write_bytes(data)
    try:
        found = read(folder / "s", 3)
        Spans(folder / "s", 3).verify(np.array([9, 9, 9]))
    except UserError:
        return
    assert all(0 <= a < b for document in found for a, b in document)
