"""Under bf16, gradients of many micro-batches are summed in fp32, whichever way they are reduced."""

import functools
import json

import pytest
from support.accumulation import accumulated, error, whole
from support.training import parallel, recipe

NUM_MICRO_BATCHES = 32
POLICIES = [(1, "step"), (2, "step"), (2, "microbatch"), (3, "step"), (3, "microbatch")]


def accumulation_recipe(ranks=2, file=None, **layout):
    samples = ranks * NUM_MICRO_BATCHES
    return recipe(parallel=layout, precision="bf16", batch={"global_samples": samples}, deepspeed_config=file)


@functools.cache
def exact(ranks):
    """fp32 arithmetic and sums."""
    return accumulated(accumulation_recipe(ranks), "fp32", "fp32")


@functools.cache
def by_hand(ranks):
    """The error of bf16 arithmetic whose gradients are added in fp32: what no accumulation can avoid."""
    return error(accumulated(accumulation_recipe(ranks), "bf16", "fp32"), exact(ranks))


def reduced(world, config, without=()):
    """A layout's gradients of one step."""
    return whole(world.run(parallel, config, 1, without, None, None, False))


@pytest.mark.parametrize(("zero", "reduce"), POLICIES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_as_exact_as_sums_in_fp32_by_hand(worlds, ranks, zero, reduce):
    found = error(reduced(worlds(ranks), accumulation_recipe(ranks, zero=zero, reduce=reduce)), exact(ranks))
    assert found <= (1.1 if reduce == "step" else 1.001) * by_hand(ranks)


def test_reduced_in_bf16_each_ranks_gradients_are_rounded_once_more(worlds, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"communication_data_type": "bf16"}))
    config = accumulation_recipe(2, str(path), zero=3, reduce="microbatch")
    assert error(reduced(worlds(2), config), exact(2)) > 1.01 * by_hand(2)


@pytest.mark.parametrize(("zero", "reduce"), POLICIES)
def test_sums_in_bf16_are_less_exact(worlds, zero, reduce):
    """What is left without the cure: the test above can tell."""
    config = accumulation_recipe(zero=zero, reduce=reduce)
    cure = "Fp32Gradients" if reduce == "step" else "fp32 partitions"
    assert error(reduced(worlds(2), config, [cure]), exact(2)) > 1.1 * by_hand(2)


def test_sums_in_bf16_by_hand_are_as_bad():
    assert error(accumulated(accumulation_recipe(), "bf16", "bf16"), exact(2)) > 1.1 * by_hand(2)
