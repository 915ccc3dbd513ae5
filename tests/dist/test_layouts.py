"""Any layout is the same training as one process: loss, norm, every gradient and every weight."""

import pytest
from support.training import deviation, parallel, recipe, reference

from megacode.errors import UserError
from megacode.plan.layout import fit

# fp32. Losses, norms and gradients differ by the order of sums alone. Adam divides a gradient's error by no less than
# epsilon (1e-5), and a step moves a weight by the learning rate (1e-2): three steps of errors near 1e-8 stay below this.
LOSS, NORM, GRADIENT, WEIGHT = 1e-6, 1e-5, 2e-6, 1e-4

GQA = {"model": {"heads": 8, "kv_heads": 4}}
MASKS = {"data": {"document_masks": True}}
SIX = {"model": {"layers": 6}}
PAIRS = {"batch": {"micro_samples": 2}}
OFFLOAD = {"deepspeed_config": "ds_configs/zero3_offload.json"}
SP = {"tensor": 2, "sequence": True}

MATRIX = [
    (1, {"zero": 1}, {}),
    (1, {"zero": 1, "recompute": "selective"}, PAIRS),
    (2, {"zero": 1}, {}),
    (2, {"zero": 2, "reduce": "step"}, {}),
    (2, {"zero": 3, "gather": "microbatch"}, {}),
    (2, {"zero": 3, "gather": "microbatch", "recompute": "full"}, {}),
    (2, {"zero": 3, "gather": "microbatch", "reduce": "step", "recompute": "selective"}, PAIRS),
    (2, {"zero": 3, "recompute": "full"}, OFFLOAD),
    (2, {"tensor": 2, "zero": 1}, {}),
    (2, {"tensor": 2, "zero": 3}, MASKS),
    (2, SP, {}),
    (2, {**SP, "recompute": "full"}, PAIRS),
    (2, {"context": 2, "zero": 1}, {}),
    (2, {"context": 2, "zero": 3, "gather": "microbatch"}, {**MASKS, **PAIRS}),
    (4, {"pipeline": 2, "zero": 1}, {}),
    (4, {"pipeline": 2, "zero": 2}, {}),
    (4, {"pipeline": 2, "zero": 2, "reduce": "step"}, {}),
    (4, {"pipeline": 2, "zero": 3}, MASKS),
    (4, {"pipeline": 2, "zero": 3, "reduce": "step"}, {}),
    (4, {"pipeline": 2, "zero": 3, "gather": "microbatch", "recompute": "full"}, {}),
    (4, {"pipeline": 2, "zero": 3, "gather": "microbatch", "reduce": "step"}, {}),
    (4, {"tensor": 2, "pipeline": 2, "zero": 3}, {}),
    (4, {"tensor": 4, "sequence": True, "zero": 3, "recompute": "selective"}, GQA),
    (4, {**SP, "zero": 2, "recompute": "selective"}, {}),
    (4, {**SP, "zero": 3}, OFFLOAD),
    (4, {**SP, "zero": 3, "gather": "microbatch", "reduce": "step"}, PAIRS),
    (4, {"context": 4, "zero": 3, "recompute": "selective"}, MASKS),
    (4, {"context": 2, "pipeline": 2, "virtual_stages": 2, "zero": 1, "recompute": "full"}, MASKS),
    (4, {**SP, "context": 2, "zero": 3, "recompute": "full"}, MASKS),
    (4, {"pipeline": 4, "zero": 3}, {}),
    (4, {"pipeline": 4, "zero": 3, "gather": "microbatch"}, SIX),
    (4, {"pipeline": 2, "virtual_stages": 2, "zero": 3}, {}),
    (4, {"pipeline": 2, "virtual_stages": 2, "zero": 3, "gather": "microbatch", "recompute": "full"}, {}),
    (4, {"pipeline": 2, "virtual_stages": 2, "zero": 2, "recompute": "selective"}, {}),
    (4, {"pipeline": 2, "virtual_stages": 2, "zero": 2, "reduce": "step"}, SIX),
    (6, {"pipeline": 3, "zero": 3, "stages": "weighed"}, SIX),
    (6, {"pipeline": 3, "zero": 2, "reduce": "step"}, {**MASKS, "batch": {"global_samples": 4}}),
    (6, {"pipeline": 3, "zero": 3, "gather": "microbatch", "stages": [1, 2, 1]}, {}),
    (6, {**SP, "pipeline": 3, "virtual_stages": 2, "zero": 1}, {**SIX, "batch": {"global_samples": 6}}),
    (8, {"tensor": 2, "pipeline": 2, "zero": 1}, {}),
    (8, {"tensor": 2, "pipeline": 2, "zero": 3, "reduce": "step"}, {}),
    (8, {**SP, "pipeline": 2, "zero": 2}, {}),
    (8, {**SP, "pipeline": 2, "zero": 3, "gather": "microbatch", "recompute": "selective"}, MASKS),
    (8, {**SP, "pipeline": 2, "virtual_stages": 2, "zero": 3, "recompute": "full"}, {}),
    (8, {**SP, "pipeline": 2, "context": 2, "zero": 3}, MASKS),
    (8, {**SP, "context": 2, "zero": 3, "gather": "microbatch", "reduce": "step", "recompute": "full"}, MASKS),
    (8, {"tensor": 2, "pipeline": 4, "zero": 3, "recompute": "selective"}, {}),
    (8, {"tensor": 4, "sequence": True, "pipeline": 2, "zero": 1, "stages": [1, 3]}, GQA),
]
"""(processes, parallel section, other sections). In every case one sample's labels are all masked (support.training).

Traps hide in the crossings, and in steps of as few micro-batches as stages (8 samples over 2, 4 or 8 data ranks).
"""


def name(case):
    world_size, layout, sections = case
    words = [f"{key}={value}" for key, value in layout.items()]
    return f"{world_size}: {' '.join(words)} {' '.join(str(value) for value in sections.values())}".strip()


@pytest.mark.parametrize(("world_size", "layout", "sections"), MATRIX, ids=map(name, MATRIX))
def test_a_layout_equals_one_process(worlds, world_size, layout, sections):
    check(worlds(world_size), recipe(parallel=layout, **sections))


def test_fewer_kv_heads_than_tensor_ranks_are_refused():
    """Grouped-query attention whose kv heads can't be split: refused, not replicated."""
    with pytest.raises(UserError, match=r"model.kv_heads \(2\) can't be split over parallel.tensor \(4\)"):
        fit(recipe(parallel={"tensor": 4}), 4)


@pytest.mark.parametrize("zero", [1, 3])
def test_the_vocabularys_padding_stays_zero(worlds, zero):
    """61 rows over two ranks are padded to 64: no loss, gradient, norm or weight decay ever reaches the other three."""
    config = recipe(parallel={"tensor": 2, "zero": zero})
    ranks = worlds(2).run(parallel, config, 3)
    shapes = [parts["lm_head.weight"] for _, parts in ranks]
    assert [part.stop - part.start for part in shapes] == [32, 29]
    assert all(outcome.padding == 0 for outcome, _ in ranks)
    assert deviation(reference(config, 3), ranks)["norm"] < NORM


def test_fewer_micro_batches_than_stages(worlds):
    check(worlds(4), recipe(parallel={"pipeline": 4, "zero": 3}, batch={"global_samples": 2}))


def test_a_single_micro_batch_of_several_samples(worlds):
    check(worlds(4), recipe(parallel={"pipeline": 2, "zero": 3}, batch={"global_samples": 8, "micro_samples": 4}))


def test_no_clipping(worlds):
    check(worlds(4), recipe(parallel={"tensor": 2, "pipeline": 2, "zero": 3}, optimizer={"clip": 0}))


@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline": 2, "zero": 1},
        {"pipeline": 2, "zero": 2},
        {"pipeline": 2, "zero": 3},
        {"pipeline": 2, "zero": 3, "reduce": "step"},
        {**SP, "context": 2, "recompute": "selective", "zero": 3, "gather": "microbatch"},
        {**SP, "pipeline": 2, "virtual_stages": 2, "recompute": "full"},
    ],
    ids=str,
)
def test_bf16_stays_near_fp32(worlds, layout):
    config = recipe(parallel=layout, precision="bf16")
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
