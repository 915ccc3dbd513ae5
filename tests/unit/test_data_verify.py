"""`megacode data verify`: every kind of damage is found, and named by file and byte; all shards are looked at."""

import errno
import json
import os
import re

import numpy as np
import pytest
from support.shards import SOURCE, write_code, write_megatron
from typer.testing import CliRunner

from megacode import cli
from megacode.data import shards as shards_module
from megacode.data import spans as spans_module
from megacode.data.spans import HEADER, Spans
from megacode.data.tokenizer import Tokenizer, train
from megacode.data.verify import num_bytes, verify
from megacode.errors import UserError

NUM_DOCUMENTS = 30


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train([SOURCE], path, 600)
    return Tokenizer(path)


@pytest.fixture
def prefix(tmp_path, tokenizer):
    write_code(tmp_path / "s", tokenizer, NUM_DOCUMENTS, spans=True)
    lines = [{"document": "a", "reason": "too large"}, {"document": "b", "line": 3, "reason": "empty"}] * 2
    (tmp_path / "s.rejects.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change_facts(tmp_path / "s", rejected={"too large": 2, "empty": 2})
    return tmp_path / "s"


def change_facts(prefix, **changes):
    path = prefix.with_name(f"{prefix.name}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put(path, place, data):
    content = bytearray(path.read_bytes())
    assert content[place : place + len(data)] != data
    content[place : place + len(data)] = data
    path.write_bytes(content)


def number(value, size=8):
    return value.to_bytes(size, "little", signed=True)


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["data", "verify", *map(str, arguments)])


def test_a_whole_shard(prefix, tokenizer):
    told = []
    found = verify(prefix, tokenizer, told.append)
    assert (found.num_documents, found.num_spans, found.unchecked) == (NUM_DOCUMENTS, NUM_DOCUMENTS // 2, ())
    parts = ("bin", "idx", "spans", "rejects.jsonl")
    assert num_bytes(prefix) == sum(prefix.with_name(f"s.{part}").stat().st_size for part in parts)
    header_bytes = 34 + 8  # and the last entry of the document index
    assert sum(told) == num_bytes(prefix) - header_bytes + 8


SPANS = HEADER.size + 8 * (NUM_DOCUMENTS + 1)
DAMAGES = [
    ("bin", 10, b"\xff\xff", r"s\.bin is damaged: byte 10 begins id 65535"),
    ("bin", 12, b"\x07\x00", r"s\.bin is damaged: bytes 0 to \d+ have another checksum"),
    ("idx", 34 + 4 * 7, number(-1, 4), r"s\.idx is damaged at byte 62: a negative length"),
    ("idx", 34 + 4 * 7, number(10**6, 4), rf"s\.idx is damaged at byte {34 + 4 * 30 + 8 * 8}: an offset"),
    ("idx", 34 + 4 * 30 + 8 * 9, number(2), rf"s\.idx is damaged at byte {34 + 4 * 30 + 8 * 9}: an offset"),
    ("idx", 34 + 12 * 30 + 8 * 5, number(6), rf"s\.idx is damaged at byte {34 + 12 * 30 + 8 * 5}: .*document index"),
    ("spans", HEADER.size + 8 * 3, number(99), rf"s\.spans is damaged at byte {HEADER.size + 8 * 3}: a wrong number"),
    ("spans", SPANS + 8 * 2, number(-1, 4), rf"s\.spans is damaged at byte {SPANS + 8 * 2}: a span"),
    ("spans", SPANS + 8 * 4 + 4, number(10**6, 4), rf"byte {SPANS + 8 * 4 + 4}: a span of document 9 ends at token 10"),
    ("rejects.jsonl", 0, b"x", r"s\.rejects\.jsonl is damaged: the line at byte 0 is no reject"),
]


@pytest.mark.parametrize(("part", "place", "data", "message"), DAMAGES)
@pytest.mark.parametrize("block", [4, 1 << 20])
def test_the_first_bad_byte_is_named(prefix, monkeypatch, part, place, data, message, block):
    for module in (shards_module, spans_module):
        monkeypatch.setattr(module, "_BLOCK", block)  # so that the blocks' seams are met
    monkeypatch.setattr(spans_module, "_VERIFIED", block)
    verify(prefix)
    put(prefix.with_name(f"s.{part}"), place, data)
    with pytest.raises(UserError, match=message) as caught:
        verify(prefix)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bin_sha256": "0" * 64}, r"s\.json is damaged: bin_sha256 is not that of its checksums"),
        ({"rejected": {"empty": 2}}, r"s\.rejects\.jsonl has .*'too large': 2.* and .*s\.json has {'empty': 2}"),
        ({"spans_sha256": "0" * 64}, r"s\.spans is damaged: it has another checksum"),
        ({"spans_sha256": None}, "its spans_sha256 cannot be understood"),
        ({"num_spans": 14}, r"s\.json says 14 loss spans and there are 15"),
        ({"num_spans": "15"}, "its num_spans cannot be understood"),
        ({"rejected": [1]}, "its rejected cannot be understood"),
        ({"languages": {"c": {"documents": 1, "tokens": 2, "bytes": 3}}}, "languages have 1 documents and the shard"),
        ({"languages": {"c": {"documents": NUM_DOCUMENTS, "tokens": 2, "bytes": 3}}}, "languages have 2 tokens"),
        ({"languages": {"c": {"documents": True}}}, "its languages cannot be understood"),
    ],
)
def test_facts_that_contradict_the_files(prefix, changes, message):
    change_facts(prefix, **changes)
    with pytest.raises(UserError, match=message):
        verify(prefix)


def test_spans_are_checked_as_they_are_read(prefix):
    lengths = np.full(NUM_DOCUMENTS, 10**6)
    clean = prefix.with_name("s.spans").read_bytes()
    for place in range(HEADER.size, len(clean)):
        prefix.with_name("s.spans").write_bytes(clean)
        put(prefix.with_name("s.spans"), place, bytes([clean[place] ^ 0x81]))
        by_document = by_block = None
        try:
            spans = Spans(prefix, NUM_DOCUMENTS)
            for document in range(NUM_DOCUMENTS):
                if (found := spans.of(document)).size and found[-1, 1] > 10**6:
                    raise UserError("beyond")
        except UserError as error:
            by_document = str(error)
        try:
            Spans(prefix, NUM_DOCUMENTS).verify(lengths)
        except UserError as error:
            by_block = str(error)
        assert (by_document is None) == (by_block is None)


def test_a_disk_that_cannot_be_read(prefix, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match=r"cannot read .*s\.bin at byte 0 and behind: Input/output error"):
        verify(prefix)


def test_megatrons_own_are_checked_as_far_as_they_can_be(tmp_path, tokenizer):
    write_megatron(tmp_path / "m", [[1, 5, 2], [], [1, 600, 2]])
    found = verify(tmp_path / "m")
    assert [what.split(" (")[0] for what in found.unchecked] == [
        "checksums and tokenizer",
        "whether ids are rows of the vocabulary",
    ]
    assert len(verify(tmp_path / "m", tokenizer).unchecked) == 1
    put(tmp_path / "m.bin", 8, number(616, 2))
    verify(tmp_path / "m")
    with pytest.raises(UserError, match=r"m\.bin is damaged: byte 8 begins id 616, .* of 616"):
        verify(tmp_path / "m", tokenizer)


def test_the_command_looks_at_all(tmp_path, prefix, tokenizer):
    write_code(tmp_path / "t", tokenizer)
    write_megatron(tmp_path / "m", [[1, 5, 2]])
    put(tmp_path / "t.bin", 6, number(9000, 2))
    every = [tmp_path / name for name in ("t", "s", "absent", "m")]
    result = invoke(*every, "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path}/t: WRONG: {tmp_path}/t.bin is damaged: byte 6 begins id 9000")
    assert re.fullmatch(r".*/s: right: 30 documents, [\d,]+ tokens, 15 loss spans", lines[1])
    assert "absent: WRONG: cannot read" in lines[2]
    assert lines[3].endswith("/m: right: 1 documents, 3 tokens")
    assert [line.partition(": not checked: ")[0] for line in lines[4:6]] == [f"{tmp_path}/m"] * 2
    assert re.fullmatch(r"2 of 4 shards are right; [\d.]+ MB in [\d.]+ s, [\d,]+ MB/s", lines[-1])
    found = json.loads((tmp_path / "out.json").read_text())
    assert [entry["problem"] is None for entry in found] == [False, True, False, True]
    assert invoke(prefix, "--tokenizer", tokenizer.path).exit_code == 0


def test_another_tokenizer_is_wrong(tmp_path, prefix):
    train([SOURCE], tmp_path / "other.model", 500)
    result = invoke(prefix, "--tokenizer", tmp_path / "other.model")
    assert result.exit_code == 1
    assert "name the one that made the shard" in result.stdout
    assert isinstance(invoke(prefix, "--tokenizer", tmp_path / "absent").exception, UserError)
