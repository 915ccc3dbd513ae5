"""megacode.data.source: many shards behave as one, with few files open."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.data import source as source_module
from megacode.data.shards import Shards, ShardWriter
from megacode.data.source import OpenShards, Source, find_shards
from megacode.data.spans import SpansWriter
from megacode.errors import UserError


def write(prefix, documents, spans=None):
    with ShardWriter(prefix, 1000, tokenizer_sha256="abc") as writer:
        for document in documents:
            writer.add_document(document)
        with SpansWriter(prefix, writer.facts) as spans_writer:
            for each in spans or [[]] * len(documents):
                spans_writer.add_document(each)


DOCUMENTS = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=30), min_size=1, max_size=40)


@settings(max_examples=50)
@given(st.lists(DOCUMENTS, min_size=1, max_size=5), st.data())
def test_it_is_one_shard(tmp_path_factory, shards, data):
    folder = tmp_path_factory.mktemp("source")
    prefixes = [folder / str(number) for number in range(len(shards))]
    for prefix, documents in zip(prefixes, shards, strict=True):
        write(prefix, documents)
    write(folder / "whole", [document for documents in shards for document in documents])
    source, whole = Source("all", prefixes), Shards(folder / "whole")
    assert (source.num_documents, source.num_tokens) == (whole.num_documents, whole.num_tokens)
    for token in range(source.num_tokens):
        assert source.document_at(token) == whole.document_at(token)
    for document in range(source.num_documents):
        assert source.document(document).tolist() == whole.document(document).tolist()
        assert source.document_start(document) == whole.document_start(document)
        shard, number = source.shard_of(document)
        assert shards[shard][number] == whole.document(document).tolist()
        assert source.first_document(shard) + number == document
    start = data.draw(st.integers(0, source.num_tokens))
    stop = data.draw(st.integers(start, source.num_tokens))
    assert source.tokens(start, stop).tolist() == whole.tokens(start, stop).tolist()
    first = whole.document_at(start) if start < whole.num_tokens else whole.num_documents
    expected = [(i, whole.document_start(i), whole.document_start(i + 1)) for i in range(first, whole.num_documents)]
    assert list(source.documents_from(start)) == expected
    assert pickle.loads(pickle.dumps(source)).tokens(start, stop).tolist() == whole.tokens(start, stop).tolist()


def test_spans(tmp_path):
    write(tmp_path / "a", [[1, 2], [3, 4]])
    write(tmp_path / "b", [[5, 6, 7], [8]], [[(0, 2)], []])
    source = Source("s", [tmp_path / "a", tmp_path / "b"])
    assert source.has_spans
    assert [None if (spans := source.spans(i)) is None else spans.tolist() for i in range(4)] == [
        *(None, None, [[0, 2]], None)
    ]
    assert Source("a", [tmp_path / "a"]).spans(0) is None


def test_identity_tells_spans_apart(tmp_path):
    identities = []
    for number, spans in enumerate((None, [[(0, 2)], []], [[(0, 1)], []], [[], [(0, 1)]], [[(0, 2)], []])):
        write(tmp_path / str(number), [[5, 6, 7], [8]], spans)
        identities.append(Source("s", [tmp_path / str(number)]).identity)
    assert len(set(identities[:4])) == 4
    assert identities[4] == identities[1]


def test_spans_that_are_gone_or_of_another_shard(tmp_path):
    write(tmp_path / "a", [[5, 6, 7], [8]], [[(0, 2)], []])
    write(tmp_path / "b", [[5, 6, 7], [8]])
    os.rename(tmp_path / "a.spans", tmp_path / "b.spans")
    for name, said, found in (("a", 1, 0), ("b", 0, 1)):
        with pytest.raises(UserError, match=f"{name}.json says {said} loss spans and there are {found}"):
            Source("s", [tmp_path / name])


def test_few_files_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "_MAX_OPEN", 3)
    prefixes = [tmp_path / str(i) for i in range(50)]
    for number, prefix in enumerate(prefixes):
        write(prefix, [[number, 7, 8]], [[(0, 1)]])
    before = len(os.listdir("/proc/self/fd"))
    pool = OpenShards()
    sources = [Source("one", prefixes[:20], pool), Source("other", prefixes[20:], pool)]
    for token in np.random.default_rng(0).permutation(60):
        assert sources[0].tokens(token, token + 1)[0] == [token // 3, 7, 8][token % 3]
        assert sources[1].tokens(token, token + 1)[0] == [20 + token // 3, 7, 8][token % 3]
        assert sources[0].spans(token // 3).tolist() == [[0, 1]]
    assert len(os.listdir("/proc/self/fd")) - before <= 4 * 4


def test_find_shards(tmp_path):
    for name in ("code-b", "code-a", "text.v1", "deep/er/code-c"):
        write(tmp_path / name, [[1]])
    found = find_shards([f"{tmp_path}/code-*", f"{tmp_path}/text.v1", f"{tmp_path}/**/code-c"])
    assert found == [tmp_path / name for name in ("code-a", "code-b", "text.v1", "deep/er/code-c")]
    for folder in ("half.parts", "done.parts.done.tmp"):
        write(tmp_path / folder / "000000" / "train", [[1]])
    assert len(find_shards([f"{tmp_path}/**/*"])) == 4, "parts of a preparation that is not finished are no shards"
    with pytest.raises(UserError, match=r"no shard matches .*/none-\*"):
        find_shards([f"{tmp_path}/none-*"])


def test_errors_name_the_shard(tmp_path, monkeypatch):
    write(tmp_path / "a", [[1, 2]])
    with pytest.raises(UserError, match=r"/b\.idx"):
        Source("s", [tmp_path / "a", tmp_path / "b"])
    monkeypatch.setattr(source_module, "_MAX_OPEN", 1)
    write(tmp_path / "b", [[1, 2]])
    source = Source("s", [tmp_path / "a", tmp_path / "b"])
    write(tmp_path / "a", [[1, 2, 3]])
    with pytest.raises(UserError, match="/a has 3 tokens and had 2 when the run began"):
        source.tokens(0, 1)


def test_identity(tmp_path):
    def identity(*names):
        return Source("s", [tmp_path / name for name in names]).identity

    write(tmp_path / "a", [[1, 2]])
    write(tmp_path / "same", [[1, 2]])
    write(tmp_path / "b", [[1, 3]])
    assert identity("a", "b") == identity("same", "b")
    assert len({identity("a", "b"), identity("b", "a"), identity("a"), identity("b")}) == 4
