"""megacode.data.shards: the bytes of the format, reading it back, and refusing damaged files."""

import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
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


def test_a_shard_goes_to_other_processes_by_its_name(tmp_path):
    write(tmp_path / "s")
    shards = Shards(tmp_path / "s")
    assert shards.tokens(0, 10).tolist() == [token for document in DOCUMENTS for token in document]
    again = pickle.loads(pickle.dumps(shards))
    assert (again.prefix, again.document(2).tolist()) == (shards.prefix, DOCUMENTS[2])


def test_more_shards_open_than_a_process_may_have_files(tmp_path):
    write(tmp_path / "s")
    code = f"""
import resource
from megacode.data.shards import Shards
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
shards = [Shards({str(tmp_path / "s")!r}) for _ in range(100)]
print(sum(int(one.document(2)[1]) for one in shards))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "30000\n"


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
        "bin_sha256": hashlib.sha256(hashlib.sha256(tokens).hexdigest().encode()).hexdigest(),
        "checksums": [[len(tokens), hashlib.sha256(tokens).hexdigest()]],
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


def test_facts_that_are_no_unicode_can_be_read(tmp_path):
    with ShardWriter(tmp_path / "s", 1000, source="ä\ud800") as writer:
        writer.add_document([1])
    assert Shards(tmp_path / "s").facts["source"] == "ä?"


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
    ("part", "place", "flip", "message"),
    [
        ("bin", 2, 2, "bytes 0 to 19 have another checksum"),
        ("bin", 13, 128, "byte 12 begins id 33068, which is no row of the vocabulary of 1000"),
        ("idx", 34 + 4 * 1 + 3, 128, r"idx is damaged at byte 38: a negative length"),
        ("idx", 34 + 4 * 1, 2, r"byte 62: an offset that is not the sum"),
        ("idx", 34 + 12 + 8, 2, r"byte 54: an offset that is not the sum"),
        ("idx", 34 + 36 + 8, 2, r"byte 78: a wrong entry in the document index"),
    ],
)
def test_verify_names_the_first_wrong_byte(tmp_path, part, place, flip, message):
    write(tmp_path / "s")
    damage(tmp_path / f"s.{part}", lambda data: data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
    with pytest.raises(UserError, match=message) as caught:
        Shards(tmp_path / "s").verify()
    assert f"s.{part}" in str(caught.value)


def test_verify_tells_how_far_it_is_and_takes_a_vocabulary(tmp_path):
    for part, data in zip(("idx", "bin"), hand_packed(DOCUMENTS, 4, "i"), strict=True):
        (tmp_path / f"m.{part}").write_bytes(data)
    told = []
    Shards(tmp_path / "m").verify(on_bytes=told.append)
    assert sum(told) == 10 * 4 + 3 * 20 + 8
    Shards(tmp_path / "m").verify(301)
    with pytest.raises(UserError, match=r"m\.bin is damaged: byte 24 begins id 300"):
        Shards(tmp_path / "m").verify(300)


def test_a_checksum_covers_a_stretch_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "STRETCH_BYTES", 8)
    documents = [[1, 2], [3, 4, 5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    write(tmp_path / "s", documents)
    shards = Shards(tmp_path / "s")
    data = (tmp_path / "s.bin").read_bytes()
    assert [size for size, _ in shards.checksums] == [4, 8, 8, 4, 6]
    place = 0
    for size, digest in shards.checksums:
        assert hashlib.sha256(data[place : place + size]).hexdigest() == digest
        place += size
    assert place == len(data)
    shards.verify()
    damage(tmp_path / "s.bin", lambda data: data[:14] + bytes([data[14] ^ 1]) + data[15:])
    with pytest.raises(UserError, match="bytes 12 to 19 have another checksum"):
        Shards(tmp_path / "s").verify()


def test_shards_are_joined_with_their_checksums(tmp_path):
    parts = [DOCUMENTS, [], [[7], [8, 9]]]
    for number, documents in enumerate(parts):
        write(tmp_path / str(number), documents)
    write(tmp_path / "whole", [document for documents in parts for document in documents])
    with ShardWriter(tmp_path / "joined", 1000, tokenizer_sha256="abc", source="test") as writer:
        for number in range(3):
            writer.add_shard(tmp_path / str(number))
    for part in ("bin", "idx"):
        assert (tmp_path / f"joined.{part}").read_bytes() == (tmp_path / f"whole.{part}").read_bytes()
    joined = Shards(tmp_path / "joined")
    joined.verify()
    assert joined.checksums == [*Shards(tmp_path / "0").checksums, *Shards(tmp_path / "2").checksums]
    assert joined.bin_sha256 != Shards(tmp_path / "whole").bin_sha256, "the identity tells stretches apart"


def use(prefix):
    """Everything that can be asked of a shard."""
    shards = Shards(prefix)
    total = shards.num_tokens
    assert len(shards.tokens(0, total)) == total
    faults = 0
    for ask in (
        shards.verify,
        *(lambda i=i: shards.document(i) for i in range(min(shards.num_documents, 20))),
        *(lambda i=i: shards.document_at(i) for i in range(min(total, 20))),
        lambda: shards.document_starts(0, shards.num_documents),
    ):
        try:
            found = ask()
        except UserError:
            faults += 1
        else:
            if isinstance(found, np.ndarray) and found.dtype != np.int64:
                assert found.size <= total
    return faults


@settings(max_examples=300)
@given(st.data())
def test_damaged_files_give_a_working_shard_or_a_user_error(tmp_path_factory, data):
    prefix = tmp_path_factory.mktemp("shard") / "s"
    code, letter = data.draw(st.sampled_from([(8, "H"), (4, "i"), (5, "q"), (1, "B")]))
    documents = data.draw(st.lists(st.lists(st.integers(0, 200), max_size=5), max_size=5))
    files = dict(zip(("idx", "bin"), hand_packed(documents, code, letter), strict=True))
    if data.draw(st.booleans()) and code == 8:
        write(prefix, [document or [1] for document in documents])
        files = {part: prefix.with_name(f"s.{part}").read_bytes() for part in ("idx", "bin", "json")}
    for part in files:
        content = bytearray(files[part])
        for place, byte in data.draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3)):
            if place < len(content):
                content[place] = byte
        cut = data.draw(st.none() | st.integers(0, len(content)))
        content += data.draw(st.just(b"") | st.binary(max_size=20))
        prefix.with_name(f"s.{part}").write_bytes(content[:cut])
    try:
        use(prefix)
    except UserError:
        return


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**64 - 1) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(key=st.sampled_from(["tokenizer_sha256", "vocabulary", "checksums", "bin_sha256", "num_tokens"]), value=ANY_JSON)
def test_any_value_in_the_json_gives_a_working_shard_or_a_user_error(tmp_path_factory, key, value):
    prefix = tmp_path_factory.mktemp("shard") / "s"
    write(prefix)
    facts = json.loads(prefix.with_name("s.json").read_text())
    prefix.with_name("s.json").write_text(json.dumps({**facts, key: value}))
    try:
        use(prefix)
    except UserError:
        return


@pytest.mark.parametrize("offsets", [[0, 10**15], [0, -8], [0, 3], [8, 0], [0, 0]])
def test_offsets_that_lead_elsewhere_are_not_followed(tmp_path, offsets):
    _, tokens = hand_packed([[1, 2], [3, 4]], 4, "i")
    last = struct.pack("<q", 8)  # the last offset must fit the .bin, or the shard does not open
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 3, 4) + struct.pack("<3i", 2, 2, 2)
    index += struct.pack("<2q", *offsets) + last + struct.pack("<4q", 0, 1, 2, 3)
    (tmp_path / "m.idx").write_bytes(index)
    (tmp_path / "m.bin").write_bytes(tokens)
    with pytest.raises(UserError, match=r"m\.idx is damaged at byte (46|54)"):
        Shards(tmp_path / "m").verify()
    assert use(tmp_path / "m") >= 1
