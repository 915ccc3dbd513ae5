"""megacode.data.corpus and prepare, and the commands over them."""

import gzip
import inspect
import json
import os
import textwrap

import pytest
import typer
from typer.testing import CliRunner

from megacode.data.corpus import Corpus
from megacode.data.prepare import prepare, train_tokenizer
from megacode.data.shards import Shards
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError
from megacode.tools import prepare as prepare_tool
from megacode.tools import tokenizer as tokenizer_tool


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.py").write_text(inspect.getsource(textwrap))
    train_tokenizer(Corpus([folder]), folder / "t.model", 500)
    return Tokenizer(folder / "t.model")


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def texts(prefix, tokenizer):
    shards = Shards(prefix)
    shards.verify()
    documents = [shards.document(i).tolist() for i in range(shards.num_documents)]
    assert all((ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos) for ids in documents)
    return [tokenizer.decode(ids[1:-1]) for ids in documents]


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


def test_a_tree_becomes_documents(tmp_path, tokenizer):
    corpus = Corpus([write(tmp_path / "tree", TREE)])
    calls = []
    summary = prepare(
        corpus, tokenizer, tmp_path / "out" / "s", on_document=lambda: calls.append(corpus.num_bytes_read)
    )
    assert sorted(texts(tmp_path / "out" / "s", tokenizer)) == ["\tb = '<s>'\n", "a = 1\r\n", "mine"]
    assert (summary.num_documents, summary.num_undecodable, summary.num_empty) == (3, 1, 2)
    assert summary.num_tokens == Shards(tmp_path / "out" / "s").num_tokens
    assert (summary.num_valid_documents, summary.num_valid_tokens) == (0, 0)
    assert calls == sorted(calls)
    assert (
        corpus.num_bytes_read
        == corpus.num_bytes
        == sum(
            len(content)
            for name, content in TREE.items()
            if name.endswith(".py") and "test" not in name and "_" not in name
        )
    )
    facts = json.loads((tmp_path / "out" / "s.json").read_text())
    assert facts["tokenizer_sha256"] == tokenizer.sha256
    assert "tree" in facts["source"]


def test_suffixes_and_excluded_folders(tmp_path):
    tree = write(tmp_path / "tree", TREE)
    documents = Corpus([tree], suffixes=[".py", ".c"], exclude=["mine", "deep"]).documents()
    assert {document.name for document in documents} == {"a.py", "c.c", "tests/t.py"}


def test_the_order_is_a_shuffle_by_name(tmp_path):
    files = {f"f{i:02}.py": str(i) for i in range(50)}
    names = [document.name for document in Corpus([write(tmp_path / "one", files)]).documents()]
    moved = [document.name for document in Corpus([write(tmp_path / "two", dict(reversed(files.items())))]).documents()]
    assert names == moved
    assert sorted(names) == sorted(files)
    assert names != sorted(names)
    fewer = {name: files[name] for name in list(files)[::2]}
    rest = [document.name for document in Corpus([write(tmp_path / "three", fewer)]).documents()]
    assert rest == [name for name in names if name in fewer]


def test_links_in_folders_are_left_alone(tmp_path):
    tree = write(tmp_path / "tree", {"a.py": "a"})
    os.symlink(tree / "a.py", tree / "b.py")
    os.symlink(tmp_path / "absent", tree / "c.py")
    os.symlink(tree, tree / "loop")
    assert [document.name for document in Corpus([tree]).documents()] == ["a.py"]


@pytest.mark.parametrize("packed", [False, True])
def test_json_lines(tmp_path, packed):
    lines = [{"text": "one"}, {"text": " "}, {"text": "bad \ud800"}, {"text": "two\n", "other": 1}]
    data = "\n".join(json.dumps(line) for line in lines).encode() + b'\n\n{"text": "\xff"}\n'
    path = tmp_path / ("d.jsonl.gz" if packed else "d.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    corpus = Corpus([path])
    found = [(document.name, document.text) for document in corpus.documents()]
    assert found == [(f"{path.name}:1", "one"), (f"{path.name}:4", "two\n")]
    assert (corpus.num_empty, corpus.num_undecodable) == (1, 2)
    assert corpus.num_bytes_read == corpus.num_bytes == path.stat().st_size
    assert len(list(Corpus([tmp_path], suffixes=[".jsonl", ".gz"]).documents())) == 2


def test_json_lines_say_where_they_are_wrong(tmp_path):
    path = tmp_path / "d.jsonl"
    for line, message in (("{", "is not JSON"), ("[1]", "--text-key"), ('{"code": "x"}', "--text-key")):
        path.write_text(f'{{"text": "x"}}\n{line}\n')
        with pytest.raises(UserError, match=rf"d\.jsonl:2 .*{message}"):
            list(Corpus([path]).documents())
    path.write_text('{"code": "x"}\n')
    assert [document.text for document in Corpus([path], text_key="code").documents()] == ["x"]


def test_validation_is_chosen_by_name(tmp_path, tokenizer):
    files = {f"{i}.py": f"x = {i}\n" for i in range(1000)}
    corpus = Corpus([write(tmp_path / "tree", files)])
    summary = prepare(corpus, tokenizer, tmp_path / "t", valid=tmp_path / "v", valid_fraction=0.2)
    train, valid = texts(tmp_path / "t", tokenizer), texts(tmp_path / "v", tokenizer)
    assert sorted(train + valid) == sorted(files.values())
    assert len(valid) == summary.num_valid_documents == pytest.approx(200, abs=42), "3.3 standard deviations are 42"
    for i in range(0, 1000, 2):
        (tmp_path / "tree" / f"{i}.py").unlink()
        (tmp_path / "tree" / f"{i + 1}.py").write_text(f"x = {i + 1}\n# changed\n")
    prepare(Corpus([tmp_path / "tree"]), tokenizer, tmp_path / "t2", valid=tmp_path / "v2", valid_fraction=0.2)
    assert {text.removesuffix("# changed\n") for text in texts(tmp_path / "v2", tokenizer)} < set(valid)


def test_prepare_refuses_and_leaves_nothing(tmp_path, tokenizer):
    tree = write(tmp_path / "tree", {"a.py": "a"})
    out = tmp_path / "out"
    for options, message in (
        ({"valid": out / "s"}, "give two prefixes"),
        ({"valid": out / "v", "valid_fraction": 1.0}, "--valid-fraction is 1.0"),
        ({"valid": out / "v", "valid_fraction": 1e-9}, r"no document is left for .*v \(0 that are not UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(Corpus([tree]), tokenizer, out / "s", **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        prepare(Corpus([tree]), tokenizer, tmp_path / "file" / "s")
    write(tree, {"b.jsonl.gz": gzip.compress(b'{"text": "x"}\n' * 1000)[:-12]})
    with pytest.raises(UserError, match=r"b\.jsonl\.gz is a damaged gzip file"):
        prepare(Corpus([tree], suffixes=[".py", ".gz"]), tokenizer, out / "s")
    assert not out.exists() or list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["absent"], "absent is no file and no folder"),
        (["a.jsonl.zst"], "Zstandard and Parquet are not read yet"),
        (["a.parquet"], "Zstandard and Parquet are not read yet"),
        (["tree"], r"tree has no file that ends in \.py; check --suffix"),
    ],
)
def test_inputs_that_are_not_read(tmp_path, inputs, message):
    write(tmp_path, {"a.jsonl.zst": "", "a.parquet": "", "tree/a.txt": ""})
    with pytest.raises(UserError, match=message):
        Corpus([tmp_path / name for name in inputs])


def test_a_tokenizer_from_the_first_documents_only(tmp_path):
    source = inspect.getsource(textwrap)
    tree = write(tmp_path / "tree", {f"{i}.py": source + f"# {i}\n" for i in range(5)})
    corpus = Corpus([tree])
    train_tokenizer(corpus, tmp_path / "one.model", 400, max_bytes=len(source) * 2)
    assert corpus.num_bytes_read < corpus.num_bytes / 2
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*t\.model"):
        train_tokenizer(corpus, tmp_path / "file" / "t.model", 400)


def test_the_commands(tmp_path, tokenizer):
    runner = CliRunner()
    tree = write(tmp_path / "tree", {f"{i}.py": inspect.getsource(textwrap) + f"# {i}\n" for i in range(40)})
    model, prefix = tmp_path / "t.model", tmp_path / "s"
    done = runner.invoke(tokenizer_tool.app, ["train", str(tree), "--output", str(model), "--pieces", "400"])
    assert (done.exit_code, done.output) == (0, f"{model}: 416 rows\n")
    done = runner.invoke(tokenizer_tool.app, ["check", str(model), "--texts", "100"])
    assert done.exit_code == 0
    assert "PRE 407, SUF 408, MID 409, EOT 410" in done.output
    assert "100 random texts" in done.output

    app = typer.Typer()
    app.command()(prepare_tool.prepare)
    arguments = [str(tree), "--tokenizer", str(model), "--output", str(prefix), "--valid", f"{prefix}-valid"]
    done = runner.invoke(app, [*arguments, "--valid-fraction", "0.3"])
    assert done.exit_code == 0, done.output
    num_documents = Shards(prefix).num_documents, Shards(f"{prefix}-valid").num_documents
    assert sum(num_documents) == 40
    assert f"{prefix}: {num_documents[0]} documents" in done.output
    assert "Tokenizing" not in done.output, "no progress bar outside a terminal"
    assert isinstance(runner.invoke(app, [*arguments, "--suffix", ".rs"]).exception, UserError)
    assert "Example: megacode prepare" in " ".join(runner.invoke(app, ["--help"]).output.split())


def test_the_command_replaces_no_shard(tmp_path, tokenizer):
    from megacode.tools.prepare import prepare as command

    tree = write(tmp_path / "tree", {"a.py": "a"})
    command([tree], tokenizer.path, tmp_path / "s")
    before = (tmp_path / "s.bin").read_bytes()
    with pytest.raises(UserError, match=r"s\.bin is there already; remove it"):
        command([tree], tokenizer.path, tmp_path / "s")
    with pytest.raises(UserError, match="--valid-fraction needs --valid"):
        command([tree], tokenizer.path, tmp_path / "other", valid_fraction=0.5)
    assert (tmp_path / "s.bin").read_bytes() == before
    assert not (tmp_path / "other.bin").exists()
