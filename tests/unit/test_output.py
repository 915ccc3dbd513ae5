"""`--json FILE` means the same in all commands: a file, or - for standard output and nothing else there."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import megacode
from megacode import cli
from megacode.errors import UserError
from megacode.tools.bench import (
    communication,
    kernels,
    loading,
    memory,
    optimizer,
    pipeline,
    scaling,
    train_cpu,
    train_gpu,
)
from megacode.tools.output import json_output


def test_a_file_holds_the_result_beside_the_text(tmp_path, capsys):
    with json_output(tmp_path / "found.json") as write:
        print("text")
        write({"a": 1})
    assert json.loads((tmp_path / "found.json").read_text()) == {"a": 1}
    assert capsys.readouterr() == ("text\n", "")


def test_standard_output_has_the_result_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with json_output(Path("-")) as write:
        print("text")
        write({"a": 1})
    print("later")
    out, err = capsys.readouterr()
    assert json.loads(out.removesuffix("later\n")) == {"a": 1}
    assert err == "text\n"
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_no_file_is_named(capsys):
    with json_output(None) as write:
        print("text")
        write({"a": 1})
    assert capsys.readouterr() == ("text\n", "")


def test_a_file_that_can_not_be_written_is_a_line(tmp_path):
    with pytest.raises(UserError, match=r"--json: .*/none is no folder; make it"), json_output(tmp_path / "none" / "x"):
        raise AssertionError("this comes before any work")
    with pytest.raises(UserError, match=r"--json: cannot write .*: Is a directory"), json_output(tmp_path) as write:
        write({})


def parameters(command, path=()):
    for name, each in getattr(command, "commands", {}).items():
        yield from parameters(each, (*path, name))
    yield from ((*path, parameter) for parameter in command.params)


def test_it_takes_a_file_in_every_command():
    app = typer.main.get_command(cli.app)
    found = {words[:-1]: words[-1] for words in parameters(app) if "--json" in words[-1].opts}
    data = {("data", name) for name in ("inspect", "replay", "verify")}
    checkpoint = {("checkpoint", name) for name in ("inspect", "prune", "verify")}
    convert = {("convert", name) for name in ("from-hf", "from-meta", "to-hf")}
    assert set(found) == data | checkpoint | convert | {("doctor",), ("plan",), ("schedule",), ("submit",), ("verify",)}
    for bench in (communication, kernels, loading, memory, optimizer, pipeline, scaling, train_cpu, train_gpu):
        one = typer.Typer()
        one.command()(bench.main)
        (found[bench.__name__],) = [p for p in typer.main.get_command(one).params if "--json" in p.opts]
    assert all(option.metavar == "FILE" and not option.is_flag for option in found.values())


def test_the_version_is_asked_for_without_a_command():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{megacode.__version__}\n")
