"""Under bf16, gradients of many micro-batches are summed in fp32, whichever way they are reduced."""

import json

import pytest
from support.accumulation import accumulated, error, whole
from support.training import parallel, recipe

NUM_MICRO_BATCHES = 32
POLICIES = [(1, "step"), (2, "step"), (2, "microbatch"), (3, "step"), (3, "microbatch")]


def accumulation_recipe(ranks=2, file=None, **layout):
    samples = ranks * NUM_MICRO_BATCHES
    return recipe(parallel=layout, precision="bf16", batch={"global_samples": samples}, deepspeed_config=file)


@pytest.fixture(scope="module")
def exact():
    """fp32 arithmetic and sums."""
    return accumulated(accumulation_recipe(), "fp32", "fp32")


@pytest.fixture(scope="module")
def by_hand(exact):
    """The error of bf16 arithmetic whose gradients are added in fp32: what no accumulation can avoid."""
    return error(accumulated(accumulation_recipe(), "bf16", "fp32"), exact)


@pytest.mark.parametrize(("zero", "reduce"), POLICIES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_as_exact_as_sums_in_fp32_by_hand(worlds, ranks, zero, reduce):
    config = accumulation_recipe(ranks, zero=zero, reduce=reduce)
    exact = accumulated(config, "fp32", "fp32")
    by_hand = error(accumulated(config, "bf16", "fp32"), exact)
    found = error(whole(worlds(ranks).run(parallel, config, 1)), exact)
    assert found <= (1.1 if reduce == "step" else 1.001) * by_hand


def test_reduced_in_bf16_each_ranks_gradients_are_rounded_once_more(worlds, tmp_path, exact, by_hand):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"communication_data_type": "bf16"}))
    config = accumulation_recipe(2, str(path), zero=3, reduce="microbatch")
    assert error(whole(worlds(2).run(parallel, config, 1)), exact) > 1.01 * by_hand


@pytest.mark.parametrize(("zero", "reduce"), POLICIES)
def test_sums_in_bf16_are_less_exact(worlds, exact, by_hand, zero, reduce):
    """What is left without the cure: the test above can tell."""
    config = accumulation_recipe(zero=zero, reduce=reduce)
    cure = "Fp32Gradients" if reduce == "step" else "fp32 partitions"
    found = error(whole(worlds(2).run(parallel, config, 1, [cure])), exact)
    assert found > 1.1 * by_hand
    assert error(accumulated(config, "bf16", "bf16"), exact) > 1.1 * by_hand
