"""`megacode data inspect`: counts against what was written, what can be infilled against the stream, and decoding."""

import json
from collections import Counter

import numpy as np
import pytest
from support.shards import SOURCE, write_code, write_megatron
from typer.testing import CliRunner

from megacode import cli
from megacode.data import lengths as lengths_module
from megacode.data.lengths import measure
from megacode.data.shards import Shards, ShardWriter
from megacode.data.source import Source
from megacode.data.stream import TrainStream
from megacode.data.tokenizer import Tokenizer, train
from megacode.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train([SOURCE], path, 600)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, tokenizer):
    return write_code(tmp_path_factory.mktemp("shard") / "s", tokenizer, 200, longest=600)


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["data", "inspect", *map(str, arguments)], env={"COLUMNS": "90"})


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_lengths(tmp_path, monkeypatch, block):
    monkeypatch.setattr(lengths_module, "_BLOCK", block)
    sizes = [1, 1, 2, 3, 4, 7, 8, 1023, 1024, 5]
    with ShardWriter(tmp_path / "s", 10) as writer:
        for size in sizes:
            writer.add_document([1] * size)
    found = measure(Shards(tmp_path / "s"), 7)
    assert (found.shortest, found.longest) == (1, 1024)
    assert found.documents[:12].tolist() == [0, 2, 2, 3, 1, 0, 0, 0, 0, 0, 1, 1]
    assert found.tokens[:12].tolist() == [0, 2, 5, 16, 8, 0, 0, 0, 0, 0, 1023, 1024]
    assert (found.too_long.documents, found.too_long.tokens) == (2, 2047)
    assert (found.uncut["best_fit"].documents, found.uncut["best_fit"].tokens) == (8, 31)
    shares = [min(1, (9 - size) / 7) for size in sizes if size <= 8]
    assert found.uncut["concatenate"].documents == pytest.approx(sum(shares))


@pytest.mark.parametrize(("packing", "off"), [("best_fit", 0), ("concatenate", 0.02)])
def test_what_is_uncut_is_what_the_stream_counts(prefix, tokenizer, packing, off):
    options = {"sequence_length": 128, "seed": 1, "packing": packing, "suffix_first_rate": 0.5}
    stream = TrainStream(
        [Source("s", [prefix])], tokenizer, **options, infilling_rate=1e-12, document_masks=False
    )  # nothing is infilled at such a rate, so nothing is pushed out
    epochs = 1 if packing == "best_fit" else 10
    counts = Counter()
    for number in range(epochs * stream.cutters[0].per_epoch):
        stream.cutters[0].pieces(number, counts)
    expected = measure(Shards(prefix), 128).uncut[packing].documents
    assert counts["uncut"] / epochs == pytest.approx(expected, rel=off)
    assert 50 < expected < 200


def test_the_command(tmp_path, prefix, tokenizer):
    result = invoke(prefix, "--tokenizer", tokenizer.path, "--sequence-length", 128, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.exception
    found = json.loads((tmp_path / "out.json").read_text())
    shards = Shards(prefix)
    lengths = np.array(shards.lengths)
    assert (found["num_documents"], found["num_tokens"]) == (200, int(lengths.sum()))
    assert (found["shortest"], found["longest"]) == (lengths.min(), lengths.max())
    assert sum(each["documents"] for each in found["lengths"]) == 200
    for each in found["lengths"]:
        held = (lengths >= each["from"]) & (lengths <= each["to"])
        assert (each["documents"], each["tokens"]) == (held.sum(), lengths[held].sum())
    assert found["bytes_per_token"] == pytest.approx(shards.facts["languages"]["python"]["bytes"] / shards.num_tokens)
    assert found["tried"]["uncut"] == found["uncut"]["best_fit"]["documents"] == (lengths <= 129).sum()
    assert 0.75 < found["tried"]["infilled"] / found["tried"]["uncut"] < 1
    for shown in found["documents"]:
        text = tokenizer.decode(shards.document(shown["document"]).tolist())
        assert [run["role"] for run in shown["runs"]] == ["marker", "text", "marker"]
        assert shown["runs"][1]["text"] == text
        assert f"<s>{text}</s>" in result.stdout
    assert {shown["kind"] for shown in found["infilled"]} <= {"PSM", "SPM"}
    for shown in found["infilled"]:
        text, (start, stop) = tokenizer.decode(shards.document(shown["document"]).tolist()), shown["cuts"]
        parts = {run["role"]: run["text"] for run in shown["runs"] if run["role"] != "marker"}
        assert parts == {
            role: part
            for role, part in (("prefix", text[:start]), ("middle", text[start:stop]), ("suffix", text[stop:]))
            if part
        }
    lines = result.stdout.splitlines()
    bars = {line.split()[0]: line for line in lines if " of documents " in line}
    assert list(bars) == [f"{each['from']:,}" for each in found["lengths"]]
    longest = max(found["lengths"], key=lambda each: each["documents"])
    assert bars[str(longest["from"])].count("█") == 40 == max(line.count("█") for line in bars.values())
    assert "< a sample of 129" in bars["128"]
    assert f"{'python':<16} {200:>13,}" in result.stdout
    assert max(map(len, lines[: lines.index("")])) < 200


def test_other_seeds_and_fewer_samples(prefix, tokenizer):
    def documents(*arguments):
        out = invoke(prefix, "--tokenizer", tokenizer.path, *arguments, "--json", "-").stdout
        return [[shown["document"] for shown in json.loads(out)[key]] for key in ("documents", "infilled")]

    assert documents() == documents("--seed", 0)
    assert documents("--seed", 1) != documents()
    assert [len(each) for each in documents("--samples", 3)] == [3, 3]
    assert [len(each) for each in documents("--samples", 0)] == [0, 0]
    assert [len(each) for each in documents("--infilling-rate", 0)] == [2, 0]


def test_tokenizers(tmp_path, prefix, tokenizer):
    train([SOURCE], tmp_path / "other.model", 500)
    other = Tokenizer(tmp_path / "other.model")
    result = invoke(prefix, "--tokenizer", other.path)
    assert f"{other.path} is ANOTHER, sha256 {other.sha256}: nothing is decoded" in result.stdout
    assert "<s>" not in result.stdout
    result = invoke(prefix)
    assert f"tokenizer: sha256 {tokenizer.sha256}; give --tokenizer to see documents" in result.stdout
    write_megatron(tmp_path / "m", [[], [tokenizer.bos, *tokenizer.encode("def f(): pass"), tokenizer.eos]])
    result = invoke(tmp_path / "m", "--tokenizer", tokenizer.path)
    assert "not known" in result.stdout
    assert "<s>def f(): pass</s>" in result.stdout
    write_megatron(tmp_path / "m", [[1, 9000, 2]])
    result = invoke(tmp_path / "m", "--tokenizer", tokenizer.path)
    assert isinstance(result.exception, UserError)
    assert "m.bin has ids that are no rows" in str(result.exception)


def test_a_long_document_is_shown_in_parts(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "s", tokenizer.vocabulary, tokenizer_sha256=tokenizer.sha256) as writer:
        writer.add_document([tokenizer.bos, *tokenizer.encode("x = 1\n" * 50_000), tokenizer.eos])
    result = invoke(tmp_path / "s", "--tokenizer", tokenizer.path)
    assert "characters ...]" in result.stdout
    assert len(result.stdout) < 5000


def test_facts_do_not_speak_to_the_terminal(tmp_path):
    with ShardWriter(tmp_path / "s", 10, source="\x1b[2J", tokenizer_sha256="\x1b]0;x\x07") as writer:
        writer.add_document([1, 2])
        writer.facts |= {"languages": {"\x1b[31mc": {"documents": 1, "tokens": 2, "bytes": 3}}, "rejected": {"\r": 1}}
    result = invoke(tmp_path / "s")
    assert result.exit_code == 0, result.exception
    assert not set(result.stdout) & set("\x1b\r\x07")
    assert "␛[31mc" in result.stdout


def test_what_cannot_be_inspected(tmp_path):
    assert isinstance(invoke(tmp_path / "absent").exception, UserError)
    with ShardWriter(tmp_path / "s", 10):
        pass
    with pytest.raises(UserError, match=r"the shard .*s is empty"):
        raise invoke(tmp_path / "s").exception
    write_megatron(tmp_path / "m", [[1, 2], [3]])
    data = bytearray((tmp_path / "m.idx").read_bytes())
    data[34:38] = b"\xff" * 4
    (tmp_path / "m.idx").write_bytes(data)
    with pytest.raises(UserError, match=r"m\.idx is damaged: a negative length"):
        raise invoke(tmp_path / "m").exception
