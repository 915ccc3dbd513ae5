"""The formulas of what a rank exchanges, where published ones or simple sums say what must come out."""

import json
from dataclasses import replace

import pytest
from support.training import recipe

from megacode.plan.communication import Exchange, exchanges, layer_exchanges, sent_bytes
from megacode.plan.layout import fit
from megacode.plan.memory import recipe_job


def job(world_size=1, file=None, **parallel):
    sections = {"model": {"kv_heads": 4}, "batch": {"global_samples": 16}, "precision": "bf16"}
    config = recipe(parallel=parallel, deepspeed_config=file, **sections)
    layout = fit(config, world_size)
    return recipe_job(config, layout)


def test_a_ring_sends_all_but_the_own_share():
    whole = 1000
    assert Exchange("", "data", "all-reduce", 4, 1, whole).sent_bytes == 1500
    assert Exchange("", "data", "reduce-scatter", 4, 1, whole).sent_bytes == 750
    assert Exchange("", "data", "all-gather", 4, 1, whole / 4).sent_bytes == 750
    assert Exchange("", "pipeline", "send", 2, 1, whole).sent_bytes == 1000


@pytest.mark.parametrize("tensor", [2, 4])
def test_sequence_parallelism_sends_no_more_in_forward_and_half_as_much_again_in_backward(tensor):
    """Korthikanti et al. 2022, section 4.2.2."""
    plain = job(tensor, tensor=tensor)
    split = replace(plain, sequence_parallel=True)
    for direction, ratio in (("forward", 1), ("backward", 1.5)):
        have, want = (sent_bytes(layer_exchanges(one, direction)) for one in (split, plain))
        assert have == pytest.approx(ratio * want)


def test_what_one_rank_sends_another_receives():
    planned = job(8, pipeline=4, tensor=2, sequence=True)
    total = {"send": 0.0, "receive": 0.0}
    for rank in range(4):
        for one in exchanges(planned, rank):
            if one.axis == "pipeline":
                total[one.kind] += one.bytes
    assert total["send"] == total["receive"] > 0


def test_one_process_exchanges_nothing():
    assert exchanges(job(zero=3, recompute="full"), 0) == []


def test_the_deepspeed_files_type_of_gradients_counts(tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"communication_data_type": "bf16"}))
    narrow, default = (
        next(one.bytes for one in exchanges(job(2, file, zero=3), 0) if one.kind == "reduce-scatter")
        for file in (str(path), None)
    )
    assert default == 2 * narrow
