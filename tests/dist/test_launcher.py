"""The real `deepspeed` launcher: a run that crashes, goes on from its checkpoint and is exported; mistakes said once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.exports import train_tokenizer

from megacode.checkpoint.store import CheckpointReader, newest
from megacode.data.corpus import Corpus
from megacode.data.prepare import prepare
from megacode.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
NUM_STEPS = 8


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A nano recipe on a corpus of two modules; four processes, TP2 x PP2 would not show data ranks, so PP2 x DP2."""
    folder = tmp_path_factory.mktemp("launcher")
    tokenizer = train_tokenizer(folder / "tokenizer.model")
    package = Path(json.__file__).parent
    prepare(Corpus([package]), Tokenizer(tokenizer), folder / "train", valid=folder / "valid", valid_fraction=0.4)
    values = {
        "run": str(folder / "run"),
        "precision": "fp32",
        "deepspeed_config": "ds_configs/zero3.json",
        "model": {"preset": "nano"},
        "tokenizer": {"path": str(tokenizer)},
        "data": {"train": str(folder / "train"), "valid": str(folder / "valid")},
        "parallel": {"pipeline": 2, "zero": 3},
        "batch": {"global_samples": 8, "micro_samples": 2, "sequence_length": 64},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"steps": NUM_STEPS, "warmup_steps": 2},
        "checkpoint": {"every_steps": 4},
        "logging": {"validate_every_steps": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(recipe: Path, *overrides: str, processes: int = 4) -> list[str]:
    port = 20000 + os.getpid() % 20000
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(processes)]
    return [*launcher, "--master_port", str(port), "launchers/train.py", str(recipe), *overrides]


ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(*arguments: str, processes: int = 4) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments, processes=processes), cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=240
    )


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


@pytest.fixture(scope="module")
def straight(recipe):
    """The run without any interruption."""
    run = recipe.parent / "straight"
    done = launch(recipe, f"run={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def test_a_run_leaves_what_it_should(straight):
    steps = [line for line in metrics(straight) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, NUM_STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert set(steps[0]) >= {"tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_bytes"}
    assert steps[-1]["tokens"] == NUM_STEPS * 8 * 64
    assert [line["step"] for line in metrics(straight) if "validation_loss" in line] == [4, 8]
    assert status(straight)["outcome"] == "finished"
    assert len(status(straight)["memory_bytes"]) == 4
    for file in newest(straight).iterdir():
        assert file.stat().st_mode & 0o777 == (straight / "metrics.jsonl").stat().st_mode & 0o777, file
    assert sorted(folder.name for folder in (straight / "checkpoints").iterdir()) == ["step_00000004", "step_00000008"]
    assert yaml.safe_load((straight / "recipe.yaml").read_text())["model"]["vocabulary"] > 0


def test_a_crash_ends_all_ranks_and_the_run_goes_on_bit_for_bit(recipe, straight):
    """One rank dies, the others must not wait for it; the next start goes on from the last checkpoint."""
    run = recipe.parent / "crashed"
    with subprocess.Popen(
        command(recipe, f"run={run}"), cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        ranks = []
        assert process.stdout is not None
        for line in process.stdout:
            if " spawned with command" in line:
                ranks.append(int(line.split("process ")[1].split()[0]))
            if line.startswith(f"step 6/{NUM_STEPS}"):
                break
        os.kill(ranks[1], signal.SIGKILL)
        died = time.monotonic()
        process.stdout.read()
        assert process.wait(timeout=60) != 0
    assert time.monotonic() - died < 30
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert status(run)["outcome"] in ("running", "failed")  # a killed rank can't say so; another may have seen it go
    assert status(run)["checkpoint"] == f"{run}/checkpoints/step_00000004"

    done = launch(recipe, f"run={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {run}/checkpoints/step_00000004 at step 4" in done.stdout
    keys = ("step", "tokens", "loss", "grad_norm", "learning_rate", "validation_loss")
    have, want = ([{k: line.get(k) for k in keys} for line in metrics(folder)] for folder in (run, straight))
    assert have == want
    ours, theirs = (CheckpointReader(newest(folder)) for folder in (run, straight))
    for name in theirs.names:
        assert (ours.read(name) == theirs.read(name)).all(), name


def test_an_error_of_a_rank_is_told_and_ends_the_run(recipe):
    run = recipe.parent / "unwritable"
    run.mkdir()
    (run / "checkpoints").write_text("a file where a folder should be")
    done = launch(recipe, f"run={run}", "checkpoint.every_steps=1")
    assert done.returncode != 0
    assert status(run)["outcome"] == "failed"
    assert "the checkpoint could not be written: NotADirectoryError" in status(run)["message"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.step=3"], "schedule.step: unknown key; did you mean steps?"),
        (["parallel.pipeline=3"], "4 processes can't be shared by"),
        (["data.train=/nowhere/train"], "/nowhere/train"),
        (["tokenizer.path=/nowhere/t.model"], "/nowhere/t.model"),
        (["batch.sequence_length=1000", "batch.global_samples=2"], "global_samples"),
        (["--deepspeed_config", "/nowhere/ds.json"], "deepspeed_config: cannot read /nowhere/ds.json"),
        (["parallel.zero=2"], "ds_configs/zero3.json: zero_optimization.stage is 3"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_2_before_any_process_group(recipe, overrides, message):
    """Each rank finds it by itself; this is rank 0 of four as a launcher starts it, without the others."""
    done = subprocess.run(
        [sys.executable, "launchers/train.py", str(recipe), *overrides],
        cwd=ROOT, env={**ENVIRONMENT, "RANK": "0", "WORLD_SIZE": "4"}, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_one_line_and_exit_2(recipe, straight):
    run = recipe.parent / "damaged"
    shutil.copytree(straight, run)
    file = newest(run) / "weights_00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = launch(recipe, f"run={run}", "schedule.steps=9")
    output = done.stdout + done.stderr
    assert done.returncode == 2, output[-3000:]
    assert output.count("error: ") == 1
    assert "weights_00003.safetensors is damaged" in output
    assert "Traceback" not in output
    assert status(run)["outcome"] == "failed"


def test_a_loss_that_is_not_finite_ends_the_run(recipe):
    run = recipe.parent / "nan"
    done = launch(recipe, f"run={run}", "optimizer.learning_rate=1e30", "optimizer.clip=0")
    assert done.returncode not in (0, 2)
    assert status(run)["outcome"] == "failed"
    assert "lower optimizer.learning_rate" in status(run)["message"]
    assert all(abs(line["loss"]) < float("inf") for line in metrics(run))


@pytest.mark.parametrize(
    ("override", "message"),
    [("model.hidden=32", "model.hidden is 32 and"), ("seed=5", "seed is 5 and"), ("batch.sequence_length=32", "batch.sequence_length is 32 and")],
)
def test_the_run_folder_of_another_recipe_is_refused(recipe, straight, override, message):
    done = subprocess.run(
        [sys.executable, "launchers/train.py", str(recipe), f"run={straight}", override],
        cwd=ROOT, env={**ENVIRONMENT, "RANK": "0", "WORLD_SIZE": "4"}, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr


def test_a_mistake_under_the_launcher_is_said_once(recipe):
    done = launch(recipe, "schedule.step=3", processes=2)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("error: ") == 1
