"""`megacode demo`: the whole way on real code. Source files, tokenizer, shards, training, export, completion."""

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from megacode.errors import UserError

FOLDER = Path("runs/demo")
RECIPE = Path("launchers/recipes/demo.yaml")
NUM_PROCESSES = 8
NUM_PIECES = 4096
VALID_FRACTION = 0.05
ENTROPY_MARGIN = 1.2
"""Nats by which the validation loss must end below the unigram entropy: a model that learns nothing of order fails.
docs/benchmarks.md has what was measured."""
LOGIT_TOLERANCE = 1e-4
"""Largest difference of logits between the export under transformers and megacode, fp32; for logits of this size."""
EXCLUDED = ["__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"]


def demo(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key.path=value", help="Passed to training.")] = None,
) -> None:
    """Train a small Code Llama on the .py files of Python's standard library, export it and let it write.

    Runs from a checkout of megacode; everything goes to runs/demo/. Running it again reuses what is done.

    Example: megacode demo schedule.steps=50
    """
    from megacode.recipe import load

    if not RECIPE.is_file():
        raise UserError(f"{RECIPE} is not here; run the demo from the root of a megacode checkout")
    started = time.monotonic()
    recipe = load(RECIPE, list(overrides or []))
    library = Path(sysconfig.get_paths()["stdlib"])
    seconds: dict[str, float] = {}
    with _phase(seconds, "tokenizer"):
        _tokenizer(library, Path(recipe.tokenizer.path))
    with _phase(seconds, "shards"):
        _shards(library, Path(recipe.tokenizer.path), recipe)
    with _phase(seconds, "training"):
        _train(recipe, list(overrides or []))
    with _phase(seconds, "export"):
        receipt = _export(library, Path(recipe.run), FOLDER / "hf")
    with _phase(seconds, "writing"):
        _write(FOLDER / "hf")
    _summary(recipe, receipt, {**seconds, "all": time.monotonic() - started})


@contextmanager
def _phase(seconds: dict[str, float], name: str) -> Iterator[None]:
    print(f"\n== {name}", flush=True)
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started


def _tokenizer(library: Path, output: Path) -> None:
    from megacode.tools import tokenizer

    if output.is_file():
        print(f"{output} is there")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.train([library], output=output, pieces=NUM_PIECES, exclude=EXCLUDED)


def _shards(library: Path, tokenizer: Path, recipe: Any) -> None:
    from megacode.tools import prepare

    train, valid = Path(recipe.data.train), Path(recipe.data.valid)
    if all(prefix.with_suffix(end).is_file() for prefix in (train, valid) for end in (".bin", ".idx")):
        print(f"{train} and {valid} are there")
        return
    train.parent.mkdir(parents=True, exist_ok=True)
    prepare.prepare([library], tokenizer, train, valid=valid, valid_fraction=VALID_FRACTION, exclude=EXCLUDED)


def _train(recipe: Any, overrides: list[str]) -> None:
    status = _status(Path(recipe.run))
    if status.get("outcome") == "finished" and status.get("step", 0) >= recipe.schedule.steps:
        print(f"{recipe.run} is finished at step {status['step']}; remove it to train again")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(NUM_PROCESSES)]
    quiet = ["--master_port", str(port), "--log_level", "error"]
    command = [*launcher, *quiet, "launchers/train.py", str(RECIPE), *overrides]
    print(" ".join(["deepspeed", *command[1:]]), flush=True)
    half = recipe.schedule.steps // 2
    if not status and half:
        Path(recipe.run).mkdir(parents=True, exist_ok=True)
        (Path(recipe.run) / "STOP").write_text(str(half), encoding="utf-8")
        _start(command, Path(recipe.run), "stopped")
        print(f"\n== training, second half: started again after the stop at step {half}", flush=True)
    (Path(recipe.run) / "STOP").unlink(missing_ok=True)  # of a first half that was interrupted
    _start(command, Path(recipe.run), "finished")


def _start(command: list[str], run: Path, outcome: str) -> None:
    """Start training; RUN/status.json must say `outcome` at its end."""
    # Eight CPU ranks, also on a machine with a GPU.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started = time.time()
    code = subprocess.run(command, env=environment, check=False).returncode
    status = _status(run)
    if status.get("outcome") != outcome:
        if code == 2 or status.get("unix_time", 0) < started:
            raise typer.Exit(code or 1)
        print(f"error: training failed: {status.get('message', 'see above')}", file=sys.stderr)
        raise typer.Exit(1)


def _status(run: Path) -> dict[str, Any]:
    path = run / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _export(library: Path, run: Path, target: Path) -> dict[str, Any]:
    """The receipt of the export, comparing on every validation document."""
    from megacode.checkpoint.convert.folder import RECEIPT
    from megacode.checkpoint.keep import newest
    from megacode.data.preparing.corpus import Corpus, is_valid
    from megacode.tools import convert

    checkpoint = newest(run)
    assert checkpoint is not None, "a finished run has a checkpoint"
    path = target / RECEIPT
    if path.is_file() and path.stat().st_mtime > (checkpoint / "manifest.json").stat().st_mtime:
        print(f"{target} is there")
    else:
        names = [document.key for document in Corpus([library], exclude=tuple(EXCLUDED)).documents()]
        texts = [library / name for name in names if is_valid(name, VALID_FRACTION)]
        convert.to_hf(run, target, text=texts, force=True)
    return json.loads(path.read_text(encoding="utf-8"))


def _write(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from megacode.tools.generate import complete, infill

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self"
    print(f"completion of {prompt!r}:\n{complete(model, tokenizer, prompt, 48)}\n")
    prefix, suffix = "def mean(values):\n    total = 0\n    for ", ":\n        total += value\n    return total\n"
    print(f"infilling between {prefix!r} and {suffix!r}:\n{infill(model, tokenizer, prefix, suffix, 16)}")


def _summary(recipe: Any, receipt: dict[str, Any], seconds: dict[str, float]) -> None:
    from megacode.checkpoint.keep import newest
    from megacode.data.shards import Shards
    from megacode.data.validation import unigram_entropy

    run = Path(recipe.run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line][-1]
    entropy = unigram_entropy(Shards(recipe.data.valid))
    logits = next(check["figures"] for check in receipt["checks"] if check["name"] == "logits")
    rates = [line["tokens_per_second"] for line in steps]
    print("\n== summary")
    for name, value in {
        "tokens seen": f"{steps[-1]['tokens']:,} in {len(steps)} steps, {median(rates):,.0f} tokens/s (median)",
        "loss": f"{steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}",
        "validation": f"{validation:.3f}, {entropy - validation:+.3f} below the unigram entropy {entropy:.3f}",
        "infilled": f"{sum(line['infilled_share'] for line in steps) / len(steps):.2%} of the labels",
        "export": f"logits differ by {logits['largest_difference']:.1e}, token ids by none",
        "run": run, "checkpoint": newest(run), "HF folder": FOLDER / "hf",
        "seconds": ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
    }.items():  # fmt: skip
        print(f"{name:12} {value}")
    if logits["largest_difference"] > LOGIT_TOLERANCE:
        print(f"error: logits of the export differ by more than {LOGIT_TOLERANCE}", file=sys.stderr)
        raise typer.Exit(1)
    if entropy - validation < ENTROPY_MARGIN:
        print(
            f"error: the validation loss is not {ENTROPY_MARGIN} below the unigram entropy after "
            f"{steps[-1]['step']} steps; train longer (the recipe's own steps get there)",
            file=sys.stderr,
        )
        raise typer.Exit(1)
