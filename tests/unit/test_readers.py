"""megacode.data.preparing.corpus, readers and streams: what is read from which file, and what is said of bad ones."""

import gzip
import io
import itertools
import json
import os
import struct
import sys
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trees import write

from megacode.data.preparing import corpus as corpus_module
from megacode.data.preparing import readers, streams
from megacode.data.preparing.corpus import Corpus
from megacode.data.preparing.filters import Filters
from megacode.data.preparing.readers import Fields, Reject, Watch
from megacode.data.preparing.streams import lines
from megacode.errors import UserError


def read(corpus):
    """(name, line, text) of the documents, the rejects, and how many bytes were told."""
    rejects, told = [], []
    documents = list(corpus.documents(Watch(told.append, rejects.append)))
    return [(document.name, document.line, document.text) for document in documents], rejects, sum(told)


TREE = {
    "a.py": "a = 1\r\n",
    "deep/b.py": "\tb = '<s>'\n",
    "c.c": "int c;",
    "bad.py": b"\xff\xfe",
    "blank.py": " \n",
    "empty.py": "",
    "tests/t.py": "test",
    "deep/__pycache__/x.py": "cache",
    "mine/m.py": "mine",
}


def test_a_tree_becomes_documents(tmp_path):
    corpus = Corpus([write(tmp_path / "tree", TREE)])
    documents, rejects, num_bytes = read(corpus)
    assert sorted(documents) == [
        ("a.py", None, "a = 1\r\n"),
        ("deep/b.py", None, "\tb = '<s>'\n"),
        ("mine/m.py", None, "mine"),
    ]
    assert {(reject.name, reject.reason) for reject in rejects} == {
        ("bad.py", "not UTF-8"),
        ("blank.py", "empty"),
        ("empty.py", "empty"),
    }
    taken = [content for name, content in TREE.items() if name.endswith(".py") and "test" not in name]
    assert num_bytes == sum(map(len, taken)) - len("cache")
    assert "tree (folders: .py)" in corpus.source


def test_suffixes_languages_and_excluded_folders(tmp_path):
    tree = write(tmp_path / "tree", TREE)
    names = {name for name, _, _ in read(Corpus([tree], suffixes=(".py", ".c"), exclude=("mine", "deep")))[0]}
    assert names == {"a.py", "c.c", "tests/t.py"}
    of_c = Corpus([tree], filters=Filters(languages=("c",)))
    assert (of_c.taken, [name for name, _, _ in read(of_c)[0]]) == ((".c", ".h"), ["c.c"])
    both = Corpus([tree], suffixes=(".py", ".c"), filters=Filters(languages=("c",)))
    assert Reject("a.py", None, "other language") in read(both)[1]


def test_the_order_is_a_shuffle_by_name(tmp_path):
    files = {f"f{i:02}.py": str(i) for i in range(50)}
    names = [name for name, _, _ in read(Corpus([write(tmp_path / "one", files)]))[0]]
    moved = [name for name, _, _ in read(Corpus([write(tmp_path / "two", dict(reversed(files.items())))]))[0]]
    assert names == moved
    assert sorted(names) == sorted(files)
    assert names != sorted(names)
    fewer = {name: files[name] for name in list(files)[::2]}
    rest = [name for name, _, _ in read(Corpus([write(tmp_path / "three", fewer)]))[0]]
    assert rest == [name for name in names if name in fewer]


def test_links_in_folders_are_left_alone(tmp_path):
    tree = write(tmp_path / "tree", {"a.py": "a"})
    os.symlink(tree / "a.py", tree / "b.py")
    os.symlink(tmp_path / "absent", tree / "c.py")
    os.symlink(tree, tree / "loop")
    assert [name for name, _, _ in read(Corpus([tree]))[0]] == ["a.py"]


def pack(data, name):
    if name.endswith(".gz"):
        return gzip.compress(data[:50]) + gzip.compress(data[50:])
    if name.endswith(".zst"):
        skippable = struct.pack("<II", 0x184D2A50, 3) + b"abc"
        return zstandard.compress(data[:50]) + skippable + zstandard.compress(data[50:])
    return data


RECORDS = [
    (b'{"text": "one"}', "one"),
    (b"", None),
    (b'{"text": " "}', "empty"),
    (b'{"text": "bad \\ud800"}', "not Unicode"),
    (b'  {"text": "two\\n", "other": NaN}\r', "two\n"),
    ('{"text": "ü\\u2028😀"}'.encode(), "ü\u2028😀"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b"{", "not JSON"),
    (b'{"text": "x"} {}', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "no JSON object"),
    (b'{"code": "x"}', "no field 'text'"),
    (b'{"text": null}', "no field 'text'"),
    (b'{"text": 7}', "the field 'text' is neither text nor a list of segments"),
    (b'{"text": [{"text": "x"}]}', "the field 'text' is neither text nor a list of segments"),
    (b'{"text": []}', "no segment is to be learned"),
    (b'{"text": "last"}', "last"),
]


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.zst"])
def test_json_lines(tmp_path, name):
    (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + b"\n".join(line for line, _ in RECORDS), name))
    documents, rejects, num_bytes = read(Corpus([tmp_path / name]))
    good = {"one", "two\n", "ü\u2028😀", "last"}
    expected = list(enumerate((outcome for _, outcome in RECORDS), 1))
    assert documents == [(name, line, outcome) for line, outcome in expected if outcome in good]
    assert rejects == [Reject(name, line, outcome) for line, outcome in expected if outcome and outcome not in good]
    assert num_bytes == (tmp_path / name).stat().st_size
    in_folder = Corpus([tmp_path], suffixes=(".jsonl", ".gz", ".zst"))
    assert read(in_folder)[0] == documents


def test_segments_and_languages(tmp_path):
    segments = [{"text": "ask ", "loss": False}, {"text": "answer", "loss": True, "more": 1}]
    records = [{"code": segments, "lang": "C++"}, {"code": "x", "lang": 7}, {"code": "y", "lang": "\ud800"}]
    write(tmp_path, {"d.jsonl": "".join(json.dumps(record) + "\n" for record in records)})
    first, second, third = Corpus([tmp_path / "d.jsonl"], fields=Fields("code", "lang")).documents()
    assert (first.text, first.segments, first.language) == ("ask answer", (("ask ", False), ("answer", True)), "c++")
    assert (second.text, second.segments, second.language) == ("x", None, None)
    assert (third.text, third.language) == ("y", None), "half a surrogate pair can't be written down"


def test_a_document_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 3 << 20)
    with (tmp_path / "d.jsonl").open("wb") as file:
        file.write(b'{"text": "one"}\n{"text": "')
        file.truncate(100 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b'"}\n{"text": "two"}\n')
    with (tmp_path / "big.py").open("wb") as file:
        file.truncate(100 << 20)
    corpus = Corpus([tmp_path / "d.jsonl", tmp_path / "big.py"], filters=Filters(max_bytes=1000))
    tracemalloc.start()
    documents, rejects, num_bytes = read(corpus)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert documents == [("d.jsonl", 1, "one"), ("d.jsonl", 1, "two")], "lines of the second unit count from 1"
    assert sorted(rejects, key=str) == [Reject("big.py", None, "too large"), Reject("d.jsonl", 2, "too large")]
    assert num_bytes == 200 * (1 << 20) + 19
    assert peak_bytes < 10 << 20


@given(st.lists(st.binary(max_size=12).map(lambda data: data.replace(b"z", b"\n"))), st.integers(0, 12))
def test_lines_of_chunks(blocks, limit):
    data = b"".join(blocks)
    expected, start = [], 0
    for line in io.BytesIO(data):
        own = line.removesuffix(b"\n")
        expected.append((start, own if len(own) <= limit else None))
        start += len(line)
    assert list(lines(iter(blocks), limit)) == expected


@given(st.lists(st.text("ab\u00e9", max_size=12), max_size=30), st.integers(1, 40), st.integers(1, 40))
def test_units_share_a_file_at_line_ends(tmp_path_factory, texts, unit_bytes, chunk_bytes):
    path = tmp_path_factory.mktemp("lines") / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"x{text}"}) if text else "" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "UNIT_BYTES", unit_bytes)
        patch.setattr(readers, "_CHUNK_BYTES", chunk_bytes)
        patch.setattr(streams, "_CHUNK_BYTES", chunk_bytes)
        corpus = Corpus([path])
        units = list(corpus.plan())
        found, base = [], 0
        for unit in units:
            watch = Watch()
            found += [(document.text, base + document.line, document.key) for document in corpus.read(unit, watch)]
            base += watch.num_lines
    assert sum(len(unit) for unit in units) == len(units) == -(-path.stat().st_size // unit_bytes)
    assert [(text, line) for text, line, _ in found] == [(f"x{t}", i) for i, t in enumerate(texts, 1) if t]
    whole = [(document.text, document.line, document.key) for document in corpus.documents()]
    assert found == whole
    assert base == path.read_bytes().count(b"\n") + (path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n"))


def test_units_of_small_inputs_are_small(tmp_path):
    for total, unit in ((1 << 20, 4 << 20), (1 << 30, 8 << 20), (1 << 40, 64 << 20)):
        with (tmp_path / "d.jsonl").open("wb") as file:
            file.truncate(total)
        units = list(itertools.islice(Corpus([tmp_path / "d.jsonl"]).plan(), 2))
        assert [piece.num_bytes for (piece,) in units] == [min(unit, total)] * len(units)


def test_small_files_share_a_unit(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "UNIT_BYTES", 100)
    files = {f"{i}.py": "x" * 30 for i in range(10)} | {"big.py": "y" * 250}
    lines = {"d.jsonl": '{"text": "z"}\n' * 20, "e.jsonl": '{"text": "z"}\n' * 2}
    corpus = Corpus([write(tmp_path, files | lines)], suffixes=(".py", ".jsonl"))
    units = list(corpus.plan())
    assert all(sum(piece.num_bytes for piece in unit) <= 100 for unit in units if len(unit) > 1)
    assert [piece.name for unit in units for piece in unit if piece.num_bytes == 250] == ["big.py"]
    assert sum(len(unit) for unit in units) == 11 + 3 + 1
    assert all(unit[0] is piece for unit in units for piece in unit if piece.start), "what goes on stands first"
    assert len(read(corpus)[0]) == 11 + 22


def write_parquet(path, texts, types=None, **options):
    column = pyarrow.array(texts, types or pyarrow.string())
    languages = pyarrow.array(["Go", "C"] * len(texts), pyarrow.string())[: len(texts)].dictionary_encode()
    pyarrow.parquet.write_table(
        pyarrow.table({"other": [1] * len(texts), "text": column, "lang": languages}), path, **options
    )


@pytest.mark.parametrize("types", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
def test_parquet(tmp_path, monkeypatch, types):
    monkeypatch.setattr(corpus_module, "UNIT_BYTES", 1)
    texts = [f"text {i}" for i in range(200)]
    texts[3], texts[150], texts[151] = None, "", "é"
    write_parquet(tmp_path / "d.parquet", texts, types, row_group_size=90)
    corpus = Corpus([tmp_path / "d.parquet"], fields=Fields(language="lang"))
    units = list(corpus.plan())
    assert [(unit[0].start, unit[0].stop) for unit in units] == [(0, 1), (1, 2), (2, 3)]
    documents, rejects, num_bytes = read(corpus)
    assert documents == [("d.parquet", i, text) for i, text in enumerate(texts, 1) if text]
    assert rejects == [Reject("d.parquet", 4, "no field 'text'"), Reject("d.parquet", 151, "empty")]
    assert num_bytes == sum(unit[0].num_bytes for unit in units) > 0
    assert [document.language for document in corpus.documents()][:2] == ["go", "c"]
    assert len({document.key for document in corpus.documents()}) == 198


def test_parquet_with_bad_text_and_segments(tmp_path):
    bad = pyarrow.array([b"one", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "bad.parquet")
    documents, rejects, _ = read(Corpus([tmp_path / "bad.parquet"]))
    assert (documents, rejects) == ([("bad.parquet", 1, "one")], [Reject("bad.parquet", 2, "not UTF-8")])
    segments = [[{"text": "a", "loss": False}, {"text": "b", "loss": True}], [{"text": "a", "loss": False}]]
    pyarrow.parquet.write_table(pyarrow.table({"text": segments}), tmp_path / "s.parquet")
    (document,) = Corpus([tmp_path / "s.parquet"]).documents()
    assert document.segments == (("a", False), ("b", True))


def spoil(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("d.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000)[:-12], "is a damaged gzip file"),
        ("d.jsonl.gz", b"no gzip", "is a damaged gzip file"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "x"}\n')[:-8] + b"\0" * 8, "is a damaged gzip file"),
        ("d.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 1000)[:-2], "is a damaged Zstandard file"),
        ("d.jsonl.zst", b"no zstd", "is a damaged Zstandard file"),
        ("d.parquet", b"PAR1 no parquet PAR1", "as Parquet"),
        ("d.parquet", b"", "as Parquet"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, data, message):
    path = spoil(tmp_path / name, data)
    with pytest.raises(UserError, match=message) as caught:
        read(Corpus([path]))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=60)
@given(st.data())
def test_damaged_files_give_documents_or_a_user_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("files")
    name = data.draw(st.sampled_from(["d.jsonl", "d.jsonl.gz", "d.jsonl.zst", "d.parquet"]))
    if name == "d.parquet":
        write_parquet(folder / name, ["one", "two"] * 10)
        content = bytearray((folder / name).read_bytes())
    else:
        content = bytearray(pack(b'{"text": "one"}\n{"text": [{"text": "a", "loss": true}]}\n' * 5, name))
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)
    ):
        content[place] = byte
    cut = data.draw(st.none() | st.integers(0, len(content)))
    (folder / name).write_bytes(content[:cut] + data.draw(st.just(b"") | st.binary(max_size=30)))
    try:
        read(Corpus([folder / name]))
    except UserError:
        return


def test_parquet_needs_pyarrow_and_the_column(tmp_path, monkeypatch):
    write_parquet(tmp_path / "d.parquet", ["x"])
    for fields, option in ((Fields("code"), "--text-field"), (Fields("text", "none"), "--language-field")):
        with pytest.raises(UserError, match=rf"has no column .*{option}"):
            read(Corpus([tmp_path / "d.parquet"], fields=fields))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"d\.parquet: reading Parquet needs pyarrow; pip install 'megacode\[data\]'"):
        read(Corpus([tmp_path / "d.parquet"]))


def test_a_file_that_changes_is_refused(tmp_path):
    corpus = Corpus([write(tmp_path, {"a.py": "a"}) / "a.py"])
    units = list(corpus.plan())
    (tmp_path / "a.py").write_text("ab")
    with pytest.raises(UserError, match=r"a\.py has changed since the start"):
        list(corpus.read(units[0]))
    (tmp_path / "a.py").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.py: No such file"):
        list(corpus.read(units[0]))


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "absent is no file and no folder"), ("tree", r"tree has no file that ends in \.py; check --suffix")],
)
def test_inputs_that_are_not_read(tmp_path, name, message):
    write(tmp_path, {"tree/a.txt": ""})
    with pytest.raises(UserError, match=message):
        list(Corpus([tmp_path / name]).plan())
