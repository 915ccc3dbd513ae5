"""A step whose loss or gradients are not finite leaves weights, moments and Adam's count alone, on every rank."""

import math

import pytest
import torch
from support.skipping import check_left_out, train
from support.training import recipe


@pytest.mark.parametrize(
    ("world_size", "layout", "precision"),
    [
        (2, {"zero": 1}, "fp32"),
        (2, {"zero": 1}, "bf16"),
        (2, {"zero": 2}, "bf16"),
        (4, {"pipeline": 2, "zero": 3}, "fp32"),
        (4, {"tensor": 2, "zero": 3, "reduce": "step"}, "bf16"),
    ],
    ids=str,
)
def test_a_bad_step_changes_nothing(worlds, world_size, layout, precision):
    config = recipe(parallel=layout, precision=precision)
    good = worlds(world_size).run(train, config, [(0, ""), (2, "")])
    bad = worlds(world_size).run(train, config, [(0, ""), (1, "gradient"), (2, ""), (3, "loss")])
    for (want, _, want_seen), (have, count, seen) in zip(good, bad, strict=True):
        assert count == 2
        assert [skipped for _, skipped in seen] == [0, 1, 0, 1]
        assert not math.isfinite(seen[1][0])
        assert math.isfinite(seen[3][0])
        assert [seen[0], seen[2]] == want_seen
        assert want
        for name, value in want.items():
            assert torch.equal(have[name], value), name


def test_offloaded_optimizers_skip_too(worlds):
    config = recipe(parallel={"zero": 3}, deepspeed_config="ds_configs/zero3_offload.json")
    check_left_out(worlds(2), config)
