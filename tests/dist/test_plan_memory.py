"""The plan's memory against live tensor bytes of our own engine at the peak of a step: within 5 % on every stage."""

import json

import pytest
from support.memory import live_bytes
from support.training import recipe

from megacode.plan.layout import fit
from megacode.plan.memory import stage_memory

BUCKET_ELEMENTS = 100_000

CASES = [
    (1, "fp32", {"zero": 1}, 1),
    (1, "fp32", {"zero": 2}, 4),
    (1, "bf16", {"zero": 1}, 4),
    (1, "bf16", {"zero": 3}, 4),
    (2, "fp32", {"zero": 3, "gather": "microbatch"}, 4),
    (2, "bf16", {"zero": 2}, 4),
    (2, "bf16", {"zero": 1}, 4),
    (2, "bf16", {"zero": 3, "reduce": "step"}, 4),
    (2, "fp32", {"tensor": 2}, 4),
    (2, "bf16", {"tensor": 2}, 4),
    (2, "fp32", {"pipeline": 2, "zero": 2}, 4),
    (2, "bf16", {"pipeline": 2}, 4),
    (2, "bf16", {"pipeline": 2}, 16),
    (2, "bf16", {"pipeline": 2, "virtual_stages": 2}, 4),
    (4, "bf16", {"tensor": 2, "pipeline": 2, "zero": 3}, 4),
    (4, "fp32", {"pipeline": 4}, 4),
]
"""World size, precision, parallel section, micro-batches a step."""


def case_recipe(folder, world_size, precision, parallel, num_micro_batches):
    """Some million parameters and 256 tokens a micro-batch; five layers, so that stages are uneven."""
    config = folder / "deepspeed.json"
    zero = {"reduce_bucket_size": BUCKET_ELEMENTS, "stage3_prefetch_bucket_size": BUCKET_ELEMENTS}
    config.write_text(json.dumps({"zero_optimization": zero}))
    data = world_size // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
    return recipe(
        precision=precision, parallel=parallel, deepspeed_config=str(config),
        model={"preset": "nano", "hidden": 128, "heads": 4, "kv_heads": 2, "ffn": 352, "layers": 5, "vocabulary": 1024},
        batch={"global_samples": num_micro_batches * data, "micro_samples": 1, "sequence_length": 256},
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plan_knows_the_live_bytes(worlds, tmp_path, case):
    world_size = case[0]
    config = case_recipe(tmp_path, *case)
    planned = stage_memory(config, fit(config, world_size))
    ranks = worlds(world_size).run(live_bytes, config)
    per_stage = world_size // len(planned)
    for stage in planned:
        measured = ranks[stage.pipeline_rank * per_stage]
        peak = max(measured["schedule"], measured["update"])
        assert stage.total_bytes == pytest.approx(peak, rel=0.05), stage
