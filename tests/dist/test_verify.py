"""`megacode verify`: runs and layouts that are equal are called so, others are not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from support.doctor import without
from support.exports import write_checkpoint
from support.launching import ENVIRONMENT, ROOT, write_recipe
from support.world import CaseError

from megacode import cli
from megacode.checkpoint.keep import newest
from megacode.doctor import processes
from megacode.tools.verify.resume import _train, compare


def run_verify(*arguments) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("megacode")), "verify", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=400)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("verify"))


# ---- layouts


def test_layouts_of_a_recipe_are_certified_on_its_own_data(recipe, tmp_path):
    result = tmp_path / "result.json"
    changes = ["data.infilling_rate=0.9", "data.document_masks=true", "batch.sequence_length=128"]
    layouts = ["--layout", "tp2 pp2 zero3 sp", "--layout", "pp2 v2 zero2 bf16", "--layout", "cp2 zero3 recompute=full"]
    done = run_verify(recipe, *changes, *layouts, "--scale", 1.5, "--steps", 3, "--json", result)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CPU processes, gloo" in done.stdout
    assert "FAILED" not in done.stdout
    found = json.loads(result.read_text())["layouts"]
    assert [(row["layout"], row["processes"], row["micro_batches"], row["ok"]) for row in found["rows"]] == [
        ("tp2 pp2 zero3 sp", 4, 4, True),
        ("pp2 v2 zero2 bf16", 2, 4, True),
        ("cp2 zero3 recompute=full", 2, 4, True),
    ]
    assert found["model"]["layers"] == 4  # 3 by scale, but a layer for each virtual stage
    assert found["model"]["hidden"] < 64
    assert len(found["one_process"]["losses"]) == 3
    for row in (found["rows"][0], found["rows"][2]):
        assert max(row["loss_difference"], row["norm_difference"], row["worst_gradient"]["difference"]) < 1e-5
        assert row["weight_difference"] < 1e-3
    bf16 = found["rows"][1]
    assert 1e-6 < bf16["loss_difference"] < 4e-3  # it is another arithmetic


@pytest.fixture
def broken(worlds, monkeypatch, capsys):
    """broken(cure, *arguments): the command with a cure of the engine left out of the ranks; exit code and output."""

    def command(cure, *arguments):
        class Ranks(processes.Processes):
            def run(self, function, *args):
                try:
                    return worlds(self.size).run(without, cure, function, *args)
                except CaseError as error:
                    raise processes.RanksError(str(error)) from None

        monkeypatch.setattr(processes, "Processes", Ranks)
        monkeypatch.setattr("sys.argv", ["megacode", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, capsys.readouterr().out

    return command


def test_wrong_layouts_are_told(broken, recipe):
    layouts = ["--layout", "tp2 pp2 zero1", "--layout", "dp2 zero3"]
    code, output = broken("mark_norm_owner", recipe, *layouts, "--steps", 2)
    assert code == 1
    first, second, third = [line for line in output.splitlines() if line.startswith("FAILED: ")]
    assert first.startswith("FAILED: tp2 pp2 zero1: norm of step 1: ")
    assert second.startswith("FAILED: tp2 pp2 zero1: the gradients of step 1 are right: it is the norm")
    assert third.startswith("FAILED: tp2 pp2 zero1: weights: ")  # clipped by it
    assert any(line.split()[:2] == ["dp2", "zero3"] and line.split()[-1] == "ok" for line in output.splitlines())


def test_wrong_gradients_are_told(broken, recipe, tmp_path):
    result = tmp_path / "result.json"
    few = ["--layout", "pp2 zero3", "batch.global_samples=4"]  # a pipeline that is all warm-up and cool-down
    code, output = broken("start_backward", recipe, *few, "--steps", 1, "--json", result)
    assert code == 1
    (row,) = json.loads(result.read_text())["layouts"]["rows"]
    assert row["worst_gradient"]["difference"] > 1e-2
    assert "gradients of step 1: " in output
    assert f"most {row['worst_gradient']['name']}, " in output
    assert not any("are right" in problem for problem in row["problems"])


def test_ranks_that_raise_are_told(broken, recipe):
    layouts = ["--layout", "pp2 dp2 zero3", "--layout", "dp2 zero1"]
    code, output = broken("check_traces_within", recipe, *layouts, "--steps", 3)
    assert code == 1
    assert "FAILED: pp2 dp2 zero3: rank" in output
    assert "disagreement" in output
    assert any(line.split()[:2] == ["dp2", "zero1"] and line.split()[-1] == "ok" for line in output.splitlines())


def test_a_run_starts_from_a_checkpoint(broken, recipe, tmp_path):
    """Both sides from the weights of checkpoint.start_from, not at random."""
    result = tmp_path / "result.json"
    shape = ["model.hidden=64", "model.ffn=176", "model.layers=2", "model.init_std=0.1"]
    figures = []
    for start in ([], [f"checkpoint.start_from={write_checkpoint(recipe.parent, seed=3).folder}"]):
        given = [recipe, *shape, *start, "--layout", "tp2 zero1", "--steps", 1, "--json", result]
        assert broken("keep_leftovers", *given)[0] == 0  # of no matter under ZeRO-1
        figures.append(json.loads(result.read_text())["layouts"]["one_process"]["losses"])
    assert figures[0] != figures[1]


# ---- resume


def test_a_resumed_run_is_certified_at_tp2_pp2_zero3_with_infilling(recipe, tmp_path):
    result = tmp_path / "result.json"
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.zero=3", "data.infilling_rate=0.9"]
    given = [recipe, *layout, "--scale", 1.5, "--processes", 8, "--steps", 2, "--more", 2, "--json", result]
    done = run_verify("--resume", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal bit for bit: loss, grad_norm, learning_rate, tokens of 4 steps, 17 files" in done.stdout
    expected = {"steps": 2, "more": 2, "processes": 8, "differences": [], "files": 17}
    assert json.loads(result.read_text()) == {"resume": expected}
    assert not list(recipe.parent.glob("run.verify.*"))


def test_a_mistake_in_the_recipe_is_one_line(recipe):
    done = run_verify("--resume", recipe, "data.train=/nowhere/train")
    assert done.returncode == 2
    assert "/nowhere/train" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(recipe.parent.glob("run.verify.*"))


def write_run(run: Path, losses: list[float], seed: int) -> Path:
    run.mkdir()
    write_checkpoint(run, seed=seed)
    lines = [{"step": n, "loss": loss, "grad_norm": 1.0, "learning_rate": 0.1, "tokens": 8} for n, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_what_differs_is_named(tmp_path):
    one = write_run(tmp_path / "one", [4.0, 3.0, 2.0], seed=1)
    same = write_run(tmp_path / "same", [4.0, 3.0, 2.0], seed=1)
    assert compare(one, same) == {"differences": [], "files": 3}
    other = write_run(tmp_path / "other", [4.0, 3.0000000000000004, 1.0], seed=2)
    differences = compare(one, other)["differences"]
    assert differences[0] == "loss of step 1: 3.0 and 3.0000000000000004"
    assert f"weights_00000.safetensors of {newest(one).name}" in differences
    short = write_run(tmp_path / "short", [4.0, 3.0], seed=1)
    assert compare(one, short)["differences"] == ["steps [0, 1, 2] and [0, 1]"]


def test_a_run_that_ends_otherwise_is_a_failure(tmp_path, capsys):
    with pytest.raises(typer.Exit) as caught:
        _train([sys.executable, "-c", "print('odd')"], tmp_path, "finished")
    assert caught.value.exit_code == 1
    assert "should be finished and is not started" in capsys.readouterr().err
