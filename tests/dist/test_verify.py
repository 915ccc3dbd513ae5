"""`megacode verify --resume`: equal runs are called equal, others are not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from support.exports import write_checkpoint
from support.launching import ENVIRONMENT, ROOT, write_recipe

from megacode.checkpoint.store import newest
from megacode.errors import UserError
from megacode.tools.verify import compare, verify


def run_verify(*arguments) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("megacode")), "verify", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=400)


def test_a_resumed_run_is_certified_at_tp2_pp2_zero3_with_infilling(tmp_path):
    recipe = write_recipe(tmp_path)
    result = tmp_path / "result.json"
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.zero=3", "data.infilling_rate=0.9"]
    done = run_verify("--resume", recipe, *layout, "--processes", 8, "--steps", 2, "--more", 2, "--json", result)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal bit for bit: loss, grad_norm, learning_rate, tokens of 4 steps, 16 files" in done.stdout
    assert json.loads(result.read_text()) == {"steps": 2, "more": 2, "processes": 8, "differences": [], "files": 16}
    assert not list(tmp_path.glob("run.verify.*"))


def test_a_mistake_in_the_recipe_is_one_line(tmp_path):
    recipe = write_recipe(tmp_path)
    done = run_verify("--resume", recipe, "data.train=/nowhere/train")
    assert done.returncode == 2
    assert "/nowhere/train" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(UserError, match="say what to verify: --resume"):
        verify(recipe)


def write_run(run: Path, losses: list[float], seed: int) -> Path:
    run.mkdir()
    write_checkpoint(run, seed=seed)
    lines = [{"step": n, "loss": loss, "grad_norm": 1.0, "learning_rate": 0.1, "tokens": 8} for n, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_what_differs_is_named(tmp_path):
    one = write_run(tmp_path / "one", [4.0, 3.0, 2.0], seed=1)
    same = write_run(tmp_path / "same", [4.0, 3.0, 2.0], seed=1)
    assert compare(one, same) == {"differences": [], "files": 2}
    other = write_run(tmp_path / "other", [4.0, 3.0000000000000004, 1.0], seed=2)
    differences = compare(one, other)["differences"]
    assert differences[0] == "loss of step 1: 3.0 and 3.0000000000000004"
    assert f"weights_00000.safetensors of {newest(one).name}" in differences
    short = write_run(tmp_path / "short", [4.0, 3.0], seed=1)
    assert compare(one, short)["differences"] == ["steps [0, 1, 2] and [0, 1]"]


def test_a_run_that_ends_otherwise_is_a_failure(tmp_path, capsys):
    from megacode.tools.verify import _train

    with pytest.raises(typer.Exit) as caught:
        _train([sys.executable, "-c", "print('odd')"], tmp_path, "finished")
    assert caught.value.exit_code == 1
    assert "should be finished and is not started" in capsys.readouterr().err
