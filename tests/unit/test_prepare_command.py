"""`megacode prepare` and `megacode tokenizer` as commands: what they say and what they refuse."""

import inspect
import textwrap

import pytest
import typer
from support.trees import small_model, write
from typer.testing import CliRunner

from megacode.data.preparing.corpus import Corpus
from megacode.data.preparing.prepare import plan, prepare
from megacode.data.shards import Shards
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError
from megacode.tools import prepare as prepare_tool
from megacode.tools import tokenizer as tokenizer_tool


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(small_model(tmp_path_factory.mktemp("tokenizer") / "t.model", 500))


def test_the_commands(tmp_path):
    runner = CliRunner()
    tree = write(tmp_path / "tree", {f"{i}.py": inspect.getsource(textwrap) + f"# {i}\n" for i in range(40)})
    write(tree, {"long.py": "x" * 2000, "small.py": "x"})
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
    options = ["--valid-fraction", "0.3", "--filter", "code", "--min-bytes", "2", "--language", "Python"]
    done = runner.invoke(app, [*arguments, *options, "--workers", "1"])
    assert done.exit_code == 0, done.output
    num_documents = Shards(prefix).num_documents, Shards(f"{prefix}-valid").num_documents
    assert sum(num_documents) == 40
    assert f"{prefix}: {num_documents[0]} documents" in done.output
    assert f"left out: 1 long lines, 1 too small ({prefix}.rejects.jsonl)" in done.output
    assert "Tokenizing" not in done.output, "no progress bar outside a terminal"
    assert isinstance(runner.invoke(app, [*arguments, "--suffix", ".rs"]).exception, UserError)
    assert "Example: megacode prepare" in " ".join(runner.invoke(app, ["--help"]).output.split())


def test_the_command_replaces_no_shard(tmp_path, tokenizer, capsys):
    from megacode.tools.prepare import prepare as command

    tree = write(tmp_path / "tree", {"a.py": "a"})
    command([tree], tokenizer.path, tmp_path / "s", workers=1)
    before = (tmp_path / "s.bin").read_bytes()
    with pytest.raises(UserError, match=r"s\.bin is there already; remove it"):
        command([tree], tokenizer.path, tmp_path / "s", min_bytes=1)
    capsys.readouterr()
    command([tree], tokenizer.path, tmp_path / "s")
    assert "s: 1 documents" in capsys.readouterr().out, "the same command says what it has made"
    assert not (tmp_path / "s.parts").exists()
    (tree / "a.py").write_text("b")
    with pytest.raises(UserError, match=r"s\.bin is there already; remove it"):
        command([tree], tokenizer.path, tmp_path / "s")
    with pytest.raises(UserError, match="--valid-fraction needs --valid"):
        command([tree], tokenizer.path, tmp_path / "other", valid_fraction=0.5)
    assert (tmp_path / "s.bin").read_bytes() == before
    assert not (tmp_path / "other.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--language", "pyhton"], "did you mean python?"),
        (["--language", "qqqq"], "GitHub Linguist's"),
        (["--text-field", "content"], "--text-field content: no input has fields"),
        (["--min-bytes", "1000", "--max-bytes", "10"], "no document is both"),
        (["a.py"], "a.py is given twice"),
        (["."], "lies in"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_any_work(tmp_path, tokenizer, monkeypatch, arguments, words):
    (tmp_path / "a.py").write_text("a = 1\n")
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(prepare_tool.prepare)
    command = ["a.py", "--tokenizer", str(tokenizer.path), "--output", "out", *arguments]
    error = CliRunner().invoke(app, command).exception
    assert isinstance(error, UserError)
    assert words in str(error)
    assert [file.name for file in tmp_path.iterdir()] == ["a.py"]


def test_ndjson_is_json_lines(tmp_path, tokenizer):
    (tmp_path / "a.ndjson").write_text('{"text": "a = 1"}\n' * 3)
    prepare(plan(Corpus([tmp_path / "a.ndjson"]), tokenizer.path, tmp_path / "out"), 1)
    assert Shards(tmp_path / "out").num_documents == 3


def test_a_tokenizer_is_not_overwritten(tmp_path):
    (tmp_path / "t.model").write_bytes(b"kept")
    error = (
        CliRunner()
        .invoke(tokenizer_tool.app, ["train", str(tmp_path), "--output", str(tmp_path / "t.model")])
        .exception
    )
    assert isinstance(error, UserError)
    assert (tmp_path / "t.model").read_bytes() == b"kept"
