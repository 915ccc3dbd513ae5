"""docs/layouts.md: its examples fit with the figures that it gives, and what it says is refused is refused."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from support.training import recipe
from typer.testing import CliRunner

from megacode.cli import app
from megacode.engine.config import deepspeed_config
from megacode.errors import UserError
from megacode.plan.layout import fit
from megacode.recipe import ParallelSection

PAGE = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"([\d.]+) GiB\.\n\n```yaml\n# gpus: (\d+)\n(.*?)```", PAGE, re.DOTALL)
OTHER = {
    "run": "unused",
    "tokenizer": {"path": "unused"},
    "data": {"train": "unused"},
    "optimizer": {"learning_rate": 3e-4},
    "schedule": {"steps": 2000},
}


@pytest.mark.parametrize(("gib", "gpus", "text"), EXAMPLES)
def test_the_plan_says_of_an_example_what_the_page_says(tmp_path, gib, gpus, text):
    file = tmp_path / "example.yaml"
    file.write_text(yaml.safe_dump({**OTHER, **yaml.safe_load(text)}))
    done = CliRunner().invoke(app, ["plan", str(file), "--gpus", gpus])
    assert done.exit_code == 0, done.output
    need = re.match(r"fits: stage \d+ needs ([\d.]+) GiB of 76 GiB\n", done.output)
    assert need, done.output.splitlines()[0]
    assert f"{float(need[1]):.1f}" == gib


def test_there_are_three_examples():
    assert len(EXAMPLES) == PAGE.count("```yaml") == 3


def test_every_key_is_on_the_page():
    for key in ParallelSection.model_fields:
        assert re.search(rf"`{key}\b", PAGE), key


@pytest.mark.parametrize(
    ("sections", "world_size"),
    [
        ({"parallel": {"tensor": 4}}, 4),
        ({"parallel": {"context": 3}}, 3),
        ({"parallel": {"tensor": 2, "sequence": True}, "batch": {"sequence_length": 15}}, 2),
        ({"parallel": {"sequence": True}}, 1),
        ({"parallel": {"pipeline": 2, "virtual_stages": 2}, "batch": {"global_samples": 3}}, 2),
        ({"parallel": {"pipeline": 5}}, 5),
        ({"parallel": {"gather": "microbatch"}}, 1),
        ({"parallel": {"reduce": "microbatch"}}, 1),
        ({"parallel": {"zero": 0}}, 1),
        ({"precision": "fp16"}, 1),
        ({"parallel": {"zero": 3, "pipeline": 2, "virtual_stages": 2}, "deepspeed_config": "offload"}, 2),
        ({"parallel": {"zero": 2, "tensor": 2, "sequence": True}, "deepspeed_config": "offload"}, 2),
    ],
)
def test_what_the_page_says_is_refused(tmp_path, sections, world_size):
    if "deepspeed_config" in sections:
        file = tmp_path / "offload.json"
        file.write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
        sections = {**sections, "deepspeed_config": str(file)}
    with pytest.raises((UserError, ValidationError)):
        prepare(sections, world_size)


def prepare(sections, world_size):
    config = recipe(**sections)
    deepspeed_config(config)
    fit(config, world_size)
