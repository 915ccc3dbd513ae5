"""megacode.data.shards: the bytes of the format, reading it back, and refusing damaged files."""

import hashlib
import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.data import shards as shards_module
from megacode.data.shards import Shards, ShardWriter
from megacode.errors import UserError

DOCUMENTS = [[1, 5, 2], [1, 2], [1, 300, 7, 7, 2]]


def write(prefix, documents=DOCUMENTS, vocabulary=1000):
    with ShardWriter(prefix, vocabulary, tokenizer_sha256="abc", source="test") as writer:
        for document in documents:
            writer.add_document(document)


def hand_packed(documents, code, letter):
    """The format written down a second time: index and tokens."""
    size = struct.calcsize(letter)
    lengths = [len(document) for document in documents]
    offsets = [sum(lengths[:i]) * size for i in range(len(lengths))]
    count = len(documents)
    index = b"MMIDIDX\0\0" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<Q", count)
    index += struct.pack("<Q", count + 1) + struct.pack(f"<{count}i", *lengths) + struct.pack(f"<{count}q", *offsets)
    index += struct.pack(f"<{count + 1}q", *range(count + 1))
    return index, b"".join(struct.pack(f"<{len(document)}{letter}", *document) for document in documents)


@pytest.mark.parametrize(("vocabulary", "code", "letter"), [(65499, 8, "H"), (65500, 4, "i"), (128256, 4, "i")])
def test_bytes_are_megatrons(tmp_path, vocabulary, code, letter):
    write(tmp_path / "a.b", vocabulary=vocabulary)
    index, tokens = hand_packed(DOCUMENTS, code, letter)
    assert (tmp_path / "a.b.idx").read_bytes() == index
    assert (tmp_path / "a.b.bin").read_bytes() == tokens
    assert json.loads((tmp_path / "a.b.json").read_text()) == {
        "tokenizer_sha256": "abc",
        "vocabulary": vocabulary,
        "source": "test",
        "num_documents": 3,
        "num_tokens": 10,
        "bin_sha256": hashlib.sha256(tokens).hexdigest(),
    }
    assert sorted(os.listdir(tmp_path)) == ["a.b.bin", "a.b.idx", "a.b.json"]


@pytest.mark.parametrize(("code", "letter"), [(8, "H"), (4, "i"), (5, "q"), (3, "h")])
def test_megatrons_own_files_open(tmp_path, code, letter):
    documents = [[1, 5, 2], [], [1, 300, 7, 7, 2]]  # Megatron keeps empty documents
    for part, data in zip(("idx", "bin"), hand_packed(documents, code, letter), strict=True):
        (tmp_path / f"m.{part}").write_bytes(data)
    shards = Shards(tmp_path / "m")
    assert [shards.document(i).tolist() for i in range(3)] == documents
    assert (shards.tokenizer_sha256, shards.vocabulary) == (None, None)
    assert [shards.document_at(token) for token in range(8)] == [0] * 3 + [2] * 5
    shards.verify()


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=9), max_size=30), st.integers(1, 7))
def test_what_was_written_is_read(tmp_path_factory, documents, block):
    prefix = tmp_path_factory.mktemp("shard") / "s"
    flat = [token for document in documents for token in document]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "_BLOCK", block)  # so that the blocks' seams are met
        write(prefix, documents)
        shards = Shards(prefix)
        shards.verify()
    assert (shards.num_documents, shards.num_tokens) == (len(documents), len(flat))
    assert [shards.document(i).tolist() for i in range(len(documents))] == documents
    assert shards.tokens(0, len(flat)).tolist() == flat
    owners = [i for i, document in enumerate(documents) for _ in document]
    assert [shards.document_at(token) for token in range(len(flat))] == owners
    starts = np.cumsum([0] + [len(document) for document in documents]).tolist()
    assert [shards.document_start(i) for i in range(len(documents) + 1)] == starts


def test_opening_does_not_read_the_index(tmp_path):
    # An index of 100 million documents, all holes: reading it would cost seconds and 2 GB, opening must not.
    count = 10**8
    with (tmp_path / "big.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, count, count + 1))
        file.truncate(34 + 20 * count + 8)
    (tmp_path / "big.bin").write_bytes(b"")
    tracemalloc.start()
    shards = Shards(tmp_path / "big")
    assert shards.num_documents == count
    assert shards.document(count // 2).tolist() == []
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_an_exception_leaves_nothing_and_keeps_the_old_shard(tmp_path):
    def fail():
        with ShardWriter(tmp_path / "s", 1000) as writer:
            writer.add_document([1, 2])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "s")
    with pytest.raises(RuntimeError):
        fail()
    assert Shards(tmp_path / "s").num_documents == 3
    write(tmp_path / "s", [[4]])
    assert Shards(tmp_path / "s").document(0).tolist() == [4]


def test_ids_outside_the_vocabulary_are_a_defect_of_the_caller(tmp_path):
    for document in ([1000], [-1], []):
        with pytest.raises(AssertionError), ShardWriter(tmp_path / "s", 1000) as writer:
            writer.add_document(document)


def damage(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data) or data)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("idx", lambda data: data[:-1], "promises"),
        ("idx", lambda data: data[:20], "no MMIDIDX"),
        ("idx", lambda data: data + b"\0\0\0", "multimodal"),
        ("idx", lambda data: b"X" + data[1:], "no MMIDIDX"),
        ("idx", lambda data: data[:9] + b"\2" + data[10:], "version 2"),
        ("idx", lambda data: data[:17] + b"\7" + data[18:], "dtype code 7"),
        ("idx", lambda data: data[:26] + b"\3" + data[27:], "one sequence a document"),
        ("bin", lambda data: data[:-2], "truncated"),
        ("bin", lambda data: data + b"\0\0", "another .idx"),
        ("json", lambda data: b"{}", "cannot be understood"),
        ("json", lambda data: data.replace(b'"num_tokens": 10', b'"num_tokens": 11'), "counts other"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, part, change, message):
    write(tmp_path / "s")
    damage(tmp_path / f"s.{part}", change)
    with pytest.raises(UserError, match=message) as caught:
        Shards(tmp_path / "s")
    assert f"s.{part}" in str(caught.value)


@pytest.mark.parametrize("part", ["idx", "bin"])
def test_a_missing_file_is_refused_by_name(tmp_path, part):
    write(tmp_path / "s")
    (tmp_path / f"s.{part}").unlink()
    with pytest.raises(UserError, match=rf"s\.{part}"):
        Shards(tmp_path / "s")


@pytest.mark.parametrize(
    ("part", "place", "message"),
    [("bin", 3, "checksum"), ("idx", 34, "follow"), ("idx", 34 + 12 + 8, "follow"), ("idx", 34 + 36 + 8, "follow")],
)
def test_verify_finds_a_flipped_byte(tmp_path, part, place, message):
    write(tmp_path / "s")
    path = tmp_path / f"s.{part}"
    data = bytearray(path.read_bytes())
    data[place] ^= 2
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        Shards(tmp_path / "s").verify()
