"""The demo, whole but with six steps: every part of the way runs, is reused, and a model that learnt nothing fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHORT = [
    *("schedule.steps=6", "schedule.warmup_steps=2", "checkpoint.every_steps=3"),
    *("logging.validate_every_steps=3", "logging.validation_samples=16"),
]


def demo(folder: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "RANK")}
    return subprocess.run(
        [str(Path(sys.executable).with_name("megacode")), "demo", *SHORT],
        cwd=folder, env=environment, text=True, capture_output=True, timeout=400,
    )  # fmt: skip


def test_the_whole_way(tmp_path):
    for name in ("launchers", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    first = demo(tmp_path)
    # Six steps cannot get a loss a whole nat below the unigram entropy: the demo must say so and fail, after the summary.
    assert first.returncode == 1, first.stdout[-3000:] + first.stderr[-3000:]
    assert "error: the validation loss is not 1.2 below the unigram entropy after 6 steps; train longer" in first.stderr
    for words in ("completion of", "infilling between", "tokens seen  24,576 in 6 steps", "token ids by none"):
        assert words in first.stdout
    folder = tmp_path / "runs" / "demo"
    for path in (
        "tokenizer/tokenizer.model", "data/train.bin", "data/train.idx", "data/valid.bin", "data/valid.idx",
        "run/recipe.yaml", "run/metrics.jsonl", "run/status.json", "run/checkpoints/step_00000006/manifest.json",
        "hf/model.safetensors", "hf/config.json", "hf/generation_config.json", "hf/tokenizer.json", "hf/tokenizer.model",
    ):  # fmt: skip
        assert (folder / path).is_file(), path
    receipt = json.loads((folder / "hf" / "conversion_receipt.json").read_text())
    figures = {check["name"]: check["figures"] for check in receipt["checks"]}
    assert receipt["agrees"]
    assert figures["logits"]["largest_difference"] <= 1e-4
    assert figures["tokenizer"]["texts"] > 10

    again = demo(tmp_path)
    for words in ("tokenizer.model is there", "valid are there", "is finished at step 6", "hf is there"):
        assert words in again.stdout
    assert again.returncode == 1
