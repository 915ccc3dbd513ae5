"""What DeepSpeed is given where its file leaves sizes to us."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime import config as ds_config
from support.training import recipe

from megacode.engine import private
from megacode.engine.config import deepspeed_config
from megacode.engine.zero import check_config
from megacode.errors import UserError
from megacode.model.layers import PlainLayers
from megacode.model.llama import Block
from megacode.recipe import ModelSection

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FILES = [None, *sorted((ROOT / "ds_configs").glob("zero3*.json"))]


def zero_section(model, file=None, **parallel):
    """zero_optimization as DeepSpeed gets it."""
    config = recipe(parallel={"zero": 3, **parallel}, deepspeed_config=None if file is None else str(file))
    return deepspeed_config(config.model_copy(update={"model": model}))["zero_optimization"]


def zero3(folder, **values):
    """A recipe with a DeepSpeed file that holds these values."""
    file = folder / "deepspeed.json"
    file.write_text(json.dumps(values))
    return recipe(parallel={"zero": 3}, deepspeed_config=str(file))


def block_on_a_rank(model, tensor):
    """Elements that ZeRO-3 gathers for a block, counted on the block itself."""
    with torch.device("meta"):
        parameters = list(Block(model, PlainLayers()).parameters())
    return sum(p.numel() // tensor if p.ndim == 2 else p.numel() for p in parameters)


@pytest.mark.parametrize("tensor", [1, 2, 8])
@pytest.mark.parametrize("preset", ["code-llama-7b", "code-llama-34b", "nano"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file and file.name)
def test_a_whole_block_is_gathered_ahead_and_no_more_where_each_use_gathers(file, preset, tensor):
    model = ModelSection(preset=preset)
    block = block_on_a_rank(model, tensor)
    zero = zero_section(model, file, tensor=tensor, gather="microbatch")
    live, ahead = zero["stage3_max_live_parameters"], zero["stage3_prefetch_bucket_size"]
    # DeepSpeed gathers up to the bucket, as far as what is there (the block that runs) leaves room for it.
    assert min(live - block, ahead) == block


def test_a_block_larger_than_a_bucket_is_gathered_ahead_whole_in_every_policy():
    model = ModelSection(preset="code-llama-7b")
    assert zero_section(model)["stage3_prefetch_bucket_size"] == block_on_a_rank(model, 1) == 202_383_360
    assert zero_section(model, tensor=8)["stage3_prefetch_bucket_size"] == 50_000_000


def test_sizes_in_the_file_count(tmp_path):
    file = tmp_path / "deepspeed.json"
    sizes = {"reduce_bucket_size": 5, "stage3_prefetch_bucket_size": 7, "stage3_max_live_parameters": 11}
    file.write_text(json.dumps({"zero_optimization": sizes}))
    assert sizes.items() <= zero_section(ModelSection(preset="nano"), file, gather="microbatch").items()


def test_no_auto_is_left_for_deepspeed(tmp_path):
    file = tmp_path / "deepspeed.json"
    keys = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters")
    file.write_text(json.dumps({"zero_optimization": dict.fromkeys(keys, "auto")}))
    assert "auto" not in zero_section(ModelSection(preset="nano"), file).values()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"foo": 3}, r"deepspeed\.json: zero_optimization\.foo: unknown to DeepSpeed [\d.]+; remove it"),
        ({"overlap_com": True}, r"zero_optimization\.overlap_com: unknown to .*; did you mean overlap_comm\?"),
        ({"offload_param": {"device": "cpu", "foo": 1}}, r"zero_optimization\.offload_param\.foo: unknown"),
        ({"reduce_bucket_size": "many"}, r"zero_optimization\.reduce_bucket_size is .many.; give a number"),
    ],
)
def test_what_deepspeed_would_refuse_is_a_line(tmp_path, section, message):
    with pytest.raises(UserError, match=message):
        check_config(zero3(tmp_path, zero_optimization=section), CPU)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("zero_optimisation", r"deepspeed\.json: zero_optimisation: unknown to .*; did you mean zero_optimization\?"),
        ("comunication_data_type", r"comunication_data_type: .*; did you mean communication_data_type\?"),
        ("sparse_attention", r"deepspeed\.json: sparse_attention: unknown to DeepSpeed [\d.]+; remove it"),
        ("_note", r"deepspeed\.json: _note: unknown to DeepSpeed [\d.]+; remove it"),
    ],
)
def test_a_key_that_deepspeed_would_not_read_is_a_line(tmp_path, key, message):
    with pytest.raises(UserError, match=message):
        check_config(zero3(tmp_path, **{key: {}}), CPU)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"communication_data_type": "fp16"}, "communication_data_type is 'fp16'; say fp32 or bf16"),
        (
            {"zero_optimization": {"reduce_bucket_size": "big"}},
            "reduce_bucket_size is 'big'; give a number",
        ),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "reduce_bucket_size is 0; give a number of elements"),
        ({"prescale_gradients": True}, r"prescale_gradients can't be used \(the recipe's loss is scaled once\)"),
        ({"gradient_predivide_factor": 4}, "gradient_predivide_factor can't be used"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel can't be used"),
        ({"wandb": {"enabled": True}}, r"wandb can't be used \(say logging.wandb in the recipe\)"),
    ],
)
def test_what_would_train_otherwise_is_a_line_for_the_plan_too(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        deepspeed_config(zero3(tmp_path, **values))


class Asked(dict):
    """A configuration that notes which keys are asked for."""

    def __init__(self, values, asked):
        super().__init__(values)
        self.asked = asked

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self  # DeepSpeed asks `key in config.keys()` too

    def __copy__(self):
        return self


def test_the_known_keys_are_those_that_deepspeed_reads(tmp_path):
    asked = set()
    ds_config.DeepSpeedConfig(Asked({"train_micro_batch_size_per_gpu": 1}, asked))
    # The one is read where no mpu and no process group is there; those that it asks for to refuse them are not known.
    read = asked - set(ds_config._REMOVED_TOP_LEVEL_CONFIG_KEYS) | {"sequence_parallel_size"}
    assert read == private.CONFIG_KEYS
    for key in private.CONFIG_KEYS - {"zero_optimization"}:
        check_config(zero3(tmp_path, **{key: "auto"}), CPU)


def test_the_files_that_come_along_are_accepted():
    for file in FILES:
        check_config(recipe(parallel={"zero": 3}, deepspeed_config=file and str(file)), CPU)
