"""The plan's memory against live tensor bytes of our own engine at the peak of a step: within 5 % on every stage."""

import json

import pytest
from support.memory import live_bytes

from megacode.plan.layout import fit
from megacode.plan.memory import stage_memory
from megacode.tools.bench.memory import BUCKET_ELEMENTS, CASES, TOLERANCE, case_recipe, compare, table

MORE = [
    (1, "fp32", {"zero": 1}, 1),
    (1, "fp32", {"zero": 2}),
    (1, "bf16", {"zero": 3}),
    (2, "bf16", {"pipeline": 2}, 16),
    (2, "fp32", {"pipeline": 2, "zero": 2}),
    (2, "fp32", {"tensor": 2}),
    (2, "fp32", {"tensor": 2, "sequence": True, "recompute": "selective"}),
    (2, "bf16", {"context": 2, "recompute": "full"}),
    (4, "bf16", {"tensor": 2, "pipeline": 2, "zero": 3}),
    (4, "fp32", {"pipeline": 4}),
    (4, "fp32", {"pipeline": 4, "stages": [2, 1, 1, 1]}),
]
"""As CASES, with the number of micro-batches where it is not the usual."""

SMALL_VOCABULARY = [
    (2, "bf16", {"tensor": 2}),
    (2, "bf16", {"tensor": 2, "recompute": "selective"}),
    (2, "bf16", {"tensor": 2, "sequence": True}),
    (2, "bf16", {"tensor": 2, "sequence": True, "recompute": "selective"}),
    (2, "fp32", {"pipeline": 2, "recompute": "selective"}),
    (2, "fp32", {"pipeline": 2, "recompute": "full"}),
    *((4, "bf16", {"context": 4, "recompute": recompute}) for recompute in ("none", "selective", "full")),
]
"""Blocks, not logits, are the worst moment: longer sequences and hardly a vocabulary."""


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_the_plan_knows_the_live_bytes(worlds, tmp_path, case):
    check(worlds(case[0]), case_recipe(tmp_path, *case))


@pytest.mark.parametrize("case", SMALL_VOCABULARY, ids=str)
def test_the_plan_knows_the_live_bytes_of_blocks(worlds, tmp_path, case):
    config = case_recipe(tmp_path, *case)
    sizes = {"vocabulary": 64, "kv_heads": 4, "ffn": 352 if case[2].get("context", 1) == 1 else 32}
    model, batch = config.model.model_copy(update=sizes), config.batch.model_copy(update={"sequence_length": 1024})
    check(worlds(case[0]), config.model_copy(update={"model": model, "batch": batch}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"pipeline": 2}], ids=str)
def test_the_plan_knows_the_live_bytes_of_whole_blocks_gathered_ahead(worlds, tmp_path, precision, parallel):
    """As the engine fills it in, for blocks of any size: here the bucket itself is many blocks."""
    world_size = 4 if parallel else 2
    config = case_recipe(tmp_path, world_size, precision, {"zero": 3, "gather": "microbatch", **parallel})
    (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": BUCKET_ELEMENTS}}))
    check(worlds(world_size), config)


def check(world, config):
    ranks = world.run(live_bytes, config)
    planned = stage_memory(config, fit(config, world.size))
    per_stage = world.size // len(planned)
    for stage in planned:
        fullest = max(ranks[stage.pipeline_rank * per_stage :][:per_stage])
        assert stage.total_bytes == pytest.approx(fullest, rel=TOLERANCE), stage


def test_the_table_has_every_stage_of_a_layout(tmp_path):
    rows = compare(case_recipe(tmp_path, 2, "bf16", {"pipeline": 2, "zero": 2}), [20_000_000, 10_000_000])
    assert [row.live_bytes for row in rows] == [20_000_000, 10_000_000]
    lines = table(rows).splitlines()[2:]
    assert [line.split(" | ")[2:4] for line in lines] == [["pipeline 2, zero 2", "0"], ["pipeline 2, zero 2", "1"]]
    assert lines[0].split(" | ")[5] == "20.00"
