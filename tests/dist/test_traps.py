"""What a pipeline over plain ZeRO engines needs: each cure, and what goes wrong without it.

A cure that a new DeepSpeed makes needless, or that no longer works, fails here.
"""

import json

import pytest
from support.stepping import device_waits
from support.training import deviation, fetches, parallel, recipe, reference
from support.world import CaseError

from megacode.engine.config import deepspeed_config
from megacode.parallel.mesh import DeepSpeedView

RIGHT, WRONG = 1e-5, 1e-2
"""Relative: right is fp32's order of sums, wrong is at least a thousand times that."""


def run(world, without=(), steps=3, precision="fp32", samples=8, **layout):
    """Deviations from one process, and the largest number of gathers of a parameter in each step."""
    config = recipe(parallel=layout, precision=precision, batch={"global_samples": samples})
    ranks = world.run(parallel, config, steps, without)
    gathers = [max(counts) for counts in zip(*(outcome.gathers for outcome, _ in ranks), strict=True)]
    return deviation(reference(config, steps), ranks), gathers


def test_the_trace_is_compared_within_a_stage(worlds):
    """ZeRO-3 compares its module trace with rank 0 of the world, and stages differ."""
    assert run(worlds(4), pipeline=2, zero=3)[0]["norm"] < RIGHT
    with pytest.raises(CaseError, match="disagreement"):
        run(worlds(4), ["check_traces_within"], pipeline=2, zero=3)


@pytest.mark.parametrize("zero", [1, 3])
def test_gradients_of_replicated_weights_are_summed_under_sequence_parallelism(worlds, zero):
    """Each tensor rank sees a part of the sequence: its gradients of norms are partial."""
    layout = {"tensor": 2, "sequence": True, "zero": zero}
    assert run(worlds(4), **layout)[0]["gradient"] < RIGHT
    assert run(worlds(4), ["sum_gradients"], **layout)[0]["gradient"] > WRONG


def test_every_backward_is_announced(worlds):
    """The first two backwards of a step without a forward between them overwrite gradients."""
    layout = {"pipeline": 2, "zero": 3, "samples": 4}
    assert run(worlds(4), **layout)[0]["gradient"] < RIGHT
    assert run(worlds(4), ["start_backward"], **layout)[0]["gradient"] > WRONG


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_norm_counts_all_stages(worlds, zero):
    """Parameters of model-parallel ranks above 0 are left out of the norm, and so of clipping."""
    layout = {"pipeline": 2, "tensor": 2, "zero": zero}
    assert run(worlds(4), **layout)[0]["norm"] < RIGHT
    deviations, _ = run(worlds(4), ["mark_norm_owner"], **layout)
    assert deviations["norm"] > WRONG
    assert deviations["gradient"] < RIGHT


def test_gradients_are_not_divided_by_accumulation_steps(worlds):
    """Each engine would divide by gradient_accumulation_steps; ours is always 1, the loss is scaled once."""
    layout = {"pipeline": 2, "zero": 3}
    assert run(worlds(4), **layout)[0]["gradient"] < RIGHT
    assert run(worlds(4), ["accumulation of 1"], **layout)[0]["gradient"] > WRONG


@pytest.mark.parametrize("cure", ["own_the_trace", "keep_leftovers"])
def test_more_gathers_without(worlds, cure):
    deviations, gathers = run(worlds(4), [cure], pipeline=2, zero=3, steps=4)
    assert min(gathers[1:]) > 2
    assert deviations["gradient"] < RIGHT


def test_a_block_is_fetched_at_once(worlds):
    """Hooks on every part of a block cost more than the block of a small model."""
    config = recipe(parallel={"zero": 3}, batch={"global_samples": 8})
    whole, parts = (max(worlds(2).run(fetches, config, without)) for without in ((), ("gather_whole",)))
    # Forward and backward of 4 micro-batches fetch: the chunks, the model, the backbone, embedding, 4 blocks, norm, head.
    assert whole == 2 * 4 * (6 + 4)
    assert parts == 2 * 4 * (6 + 4 * 7)  # column-parallel maps are not called as modules


def test_zero_init_shards_over_the_data_group(worlds):
    """The default group of zero.Init is the world, which mixes parameters of different stages."""
    with pytest.raises(CaseError):
        run(worlds(4), ["zero.Init_group"], pipeline=2, zero=3)


def test_interleaved_chunks_start_from_empty_partitions(worlds):
    """A chunk whose first backward comes late would add onto the last step's gradients."""
    layout = {"pipeline": 2, "virtual_stages": 2, "zero": 3}
    assert run(worlds(4), **layout)[0]["norm"] < RIGHT
    assert run(worlds(4), ["clear_partitions"], **layout)[0]["norm"] > WRONG


@pytest.mark.parametrize("zero", [1, 3])
def test_context_ranks_are_data_ranks_to_deepspeed(worlds, zero):
    """ZeRO shards and reduces over data x context; sequence methods would bypass that."""
    assert not [name for name in dir(DeepSpeedView) if "sequence" in name]
    layout = {"pipeline": 2, "zero": zero, "context": 2}
    assert run(worlds(4), **layout)[0]["gradient"] < RIGHT
    assert run(worlds(4), ["context in the data group"], **layout)[0]["gradient"] > WRONG


@pytest.mark.parametrize("layout", [{"zero": 1}, {"zero": 3}], ids=str)
def test_no_forward_waits_for_the_device(worlds, layout):
    """DeepSpeed's throughput timer does, once it has seen two steps."""
    config = recipe(parallel=layout)
    assert worlds(2).run(device_waits, config, 4, False) == [[0] * 4] * 2
    for waits in worlds(2).run(device_waits, config, 4, True):
        assert waits[:2] == [0, 0]
        assert min(waits[2:]) >= 4  # at each of four forwards


def test_offload_needs_no_compiler(worlds, tmp_path):
    """CPU offload runs torch's Adam; DeepSpeed's own would be compiled at start."""
    config = recipe(parallel={"pipeline": 2, "zero": 3}, deepspeed_config="ds_configs/zero3_offload.json")
    assert deepspeed_config(config)["zero_force_ds_cpu_optimizer"] is False
    outcome = deviation(reference(config, 3), worlds(4).run(parallel, config, 3))
    assert outcome["gradient"] < RIGHT
    assert outcome["norm"] < RIGHT
    with pytest.raises(CaseError, match="DeepSpeedCPUAdam|CPU optimizer|compil"):
        worlds(4).run(parallel, config, 1, ["torch's Adam under offload"])
    interleaved = {"parallel": {"pipeline": 2, "virtual_stages": 2, "zero": 3}}
    with pytest.raises(ValueError, match=r"virtual_stages above 1 needs parallel\.reduce: step"):
        deepspeed_config(recipe(**interleaved, deepspeed_config="ds_configs/zero3_offload.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, r"stage is 2 and the recipe's parallel\.zero is 3"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping is decided by the recipe's optimizer\.clip"),
        ({"fp16": {"enabled": True}}, r"fp16 is decided by the recipe's precision"),
        ({"zero_optimization": None}, r"zero_optimization must be a JSON object"),
        ({"zero_optimization": {"stage": "3"}}, r"stage is '3' and the recipe's parallel\.zero is 3"),
        ({"zero_optimization": {"stage3_max_reuse_distance": 5}}, r"reuse_distance is decided by .*parallel\.gather"),
        ({"zero_optimization": {"memory_efficient_linear": True}}, r"memory_efficient_linear can't be used"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, r"offload_param\.device nvme can't be used"),
        ({"amp": {"enabled": True}}, r"amp can't be used"),
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps is decided by the recipe's batch"),
    ],
)
def test_a_file_that_contradicts_the_recipe_is_refused(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        deepspeed_config(recipe(parallel={"zero": 3}, deepspeed_config=str(path)))
    path.write_text(json.dumps({"gradient_clipping": "auto", "zero_optimization": {"stage": "auto"}}))
    assert deepspeed_config(recipe(parallel={"zero": 3}, deepspeed_config=str(path)))["gradient_clipping"] == 0.5
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        deepspeed_config(recipe(parallel={"zero": 3}, deepspeed_config=str(path)))
