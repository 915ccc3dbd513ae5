"""The real `deepspeed` launcher on a small recipe, and what its runs leave."""

import ast
import dataclasses
import inspect
import json
import os
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import yaml

from megacode.data.preparing.corpus import Corpus
from megacode.data.preparing.prepare import plan, prepare
from support.exports import train_tokenizer

ROOT = Path(__file__).parents[2]
NUM_STEPS = 8


def write_functions(path: Path) -> Path:
    """The functions of some modules: short documents, that lie uncut in a sequence and become infilling documents."""
    with path.open("w", encoding="utf-8") as file:
        for module in (ast, dataclasses, inspect, textwrap, typing):
            source = Path(module.__file__).read_bytes()
            lines = source.splitlines(keepends=True)
            for node in ast.walk(ast.parse(source)):
                if not isinstance(node, ast.FunctionDef):
                    continue
                # What ast.get_source_segment gives, which splits the whole source for each.
                own = [*lines[node.lineno - 1 : node.end_lineno - 1], lines[node.end_lineno - 1][: node.end_col_offset]]
                text = b"".join([own[0][node.col_offset :], *own[1:]]).decode()
                if len(text) < 120:
                    file.write(json.dumps({"text": text}) + "\n")
    return path


def write_recipe(folder: Path) -> Path:
    """A nano recipe on a corpus of one package; four processes, PP2 x DP2."""
    tokenizer = train_tokenizer(folder / "tokenizer.model")
    sources = [Path(json.__file__).parent, write_functions(folder / "functions.jsonl")]
    job = plan(Corpus(sources), tokenizer, folder / "train", valid=folder / "valid", valid_fraction=0.4)
    prepare(job, workers=1)
    values = {
        "run": str(folder / "run"),
        "precision": "fp32",
        "deepspeed_config": "ds_configs/zero3.json",
        "model": {"preset": "nano"},
        "tokenizer": {"path": str(tokenizer)},
        "data": {"train": str(folder / "train"), "valid": str(folder / "valid"), "workers": 0},
        "parallel": {"pipeline": 2, "zero": 3},
        "batch": {"global_samples": 8, "micro_samples": 2, "sequence_length": 64},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"steps": NUM_STEPS, "warmup_steps": 2},
        "checkpoint": {"every_steps": 4},
        "logging": {"validate_every_steps": 4, "validation_samples": 16},
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


def start(recipe: Path, *overrides: str) -> subprocess.Popen:
    """One process, without a launcher."""
    environment = {**ENVIRONMENT, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}
    changes = ["parallel.pipeline=1", "logging.validate_every_steps=100", *overrides]
    return subprocess.Popen(
        [sys.executable, "launchers/train.py", str(recipe), *changes], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def train(recipe: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and output of `start`."""
    with start(recipe, *overrides) as process:
        output, _ = process.communicate(timeout=240)
        return process.returncode, output


def told(code: int, output: str) -> str:
    """The one line of a mistake."""
    assert code == 2, output[-3000:]
    assert "Traceback" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    return line.removeprefix("error: ")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())
