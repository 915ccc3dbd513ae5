"""Any layout is the same training as one process: loss, norm, every gradient and every weight."""

import pytest
from support.training import deviation, parallel, recipe, reference

# fp32. Losses, norms and gradients differ by the order of sums alone. Weights after Adam: a gradient near zero may
# change sign between orders of summation and moves its weight by up to the learning rate (1e-2) times a small share.
LOSS, NORM, GRADIENT, WEIGHT = 1e-6, 1e-5, 2e-6, 1e-4

LAYOUTS = [
    (1, {"zero": 1}),
    (2, {"zero": 1}),
    (2, {"zero": 2, "reduce": "step"}),
    (2, {"zero": 3, "gather": "microbatch"}),
    (2, {"tensor": 2, "zero": 1}),
    (2, {"tensor": 2, "zero": 3}),
    (4, {"pipeline": 2, "zero": 1}),
    (4, {"pipeline": 2, "zero": 2}),
    (4, {"pipeline": 2, "zero": 2, "reduce": "step"}),
    (4, {"pipeline": 2, "zero": 3}),
    (4, {"pipeline": 2, "zero": 3, "reduce": "step"}),
    (4, {"pipeline": 2, "zero": 3, "gather": "microbatch"}),
    (4, {"pipeline": 2, "zero": 3, "gather": "microbatch", "reduce": "step"}),
    (4, {"tensor": 2, "pipeline": 2, "zero": 3}),
    (4, {"pipeline": 4, "zero": 3}),
    (4, {"pipeline": 2, "virtual_stages": 2, "zero": 3}),
    (4, {"pipeline": 2, "virtual_stages": 2, "zero": 2}),
    (4, {"pipeline": 2, "virtual_stages": 2, "zero": 2, "reduce": "step"}),
    (8, {"tensor": 2, "pipeline": 2, "zero": 1}),
    (8, {"tensor": 2, "pipeline": 2, "zero": 2}),
    (8, {"tensor": 2, "pipeline": 2, "zero": 3}),
    (8, {"tensor": 2, "pipeline": 2, "zero": 3, "reduce": "step"}),
    (8, {"tensor": 2, "pipeline": 4, "zero": 3}),
]


def name(case):
    return f"{case[0]}: " + " ".join(f"{key}={value}" for key, value in case[1].items())


@pytest.mark.parametrize(("world_size", "layout"), LAYOUTS, ids=map(name, LAYOUTS))
def test_a_layout_equals_one_process(worlds, world_size, layout):
    check(worlds(world_size), recipe(parallel=layout))


@pytest.mark.parametrize("zero", [1, 3])
def test_document_masks(worlds, zero):
    config = recipe(parallel={"tensor": 2, "pipeline": 2, "zero": zero}, data={"document_masks": True})
    check(worlds(4), config)


@pytest.mark.parametrize("zero", [1, 3])
def test_the_vocabularys_padding_stays_zero(worlds, zero):
    """61 rows over two ranks are padded to 64: no loss, gradient, norm or weight decay ever reaches the other three."""
    config = recipe(parallel={"tensor": 2, "zero": zero})
    ranks = worlds(2).run(parallel, config, 3)
    shapes = [parts["lm_head.weight"] for _, parts in ranks]
    assert [part.stop - part.start for part in shapes] == [32, 29]
    assert all(outcome.padding == 0 for outcome, _ in ranks)
    assert deviation(reference(config, 3), ranks)["norm"] < NORM


def test_uneven_stages(worlds):
    check(worlds(4), recipe(parallel={"pipeline": 4, "zero": 3}, model={"layers": 6}))


def test_fewer_micro_batches_than_stages(worlds):
    check(worlds(4), recipe(parallel={"pipeline": 4, "zero": 3}, batch={"global_samples": 2}))


def test_a_single_micro_batch_of_several_samples(worlds):
    check(worlds(4), recipe(parallel={"pipeline": 2, "zero": 3}, batch={"global_samples": 8, "micro_samples": 4}))


def test_no_clipping(worlds):
    check(worlds(4), recipe(parallel={"tensor": 2, "pipeline": 2, "zero": 3}, optimizer={"clip": 0}))


@pytest.mark.parametrize(
    "layout",
    [{"zero": 1}, {"zero": 2}, {"zero": 3}, {"zero": 3, "reduce": "step"}],
    ids=["zero1", "zero2", "zero3", "zero3 reduce=step"],
)
def test_bf16_stays_near_fp32(worlds, layout):
    config = recipe(parallel={"pipeline": 2, **layout}, precision="bf16")
    outcome = deviation(reference(config, steps=1), worlds(4).run(parallel, config, 1))
    # bf16 keeps 8 bits: one rounding is 4e-3, and a gradient has gone through some ten of them, mostly averaging out.
    assert outcome["loss"] < 4e-3
    assert outcome["gradient"] < 4e-2


def check(world, config):
    outcome = deviation(reference(config, steps=3), world.run(parallel, config, 3))
    assert outcome["loss"] < LOSS
    assert outcome["validation"] < WEIGHT
    assert outcome["norm"] < NORM
    assert outcome["gradient"] < GRADIENT
    assert outcome["weight"] < WEIGHT
