"""What a step's ranks really send, against the formulas of megacode/plan/communication.py: calls and bytes, by kind."""

import json

import pytest
from support.traffic import counted_twice, step_calls, step_fetches, trainer_calls
from support.training import recipe

from megacode.plan.layout import fit
from megacode.plan.model import block_parameters
from megacode.tools.bench.communication import compare_ranks, is_small

LAYOUTS = [
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "recompute": "full"}),
    (2, {"tensor": 2, "recompute": "selective"}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"tensor": 2, "sequence": True, "recompute": "full"}),
    (2, {"tensor": 2, "sequence": True, "recompute": "selective"}),
    (2, {"context": 2}),
    (2, {"context": 2, "recompute": "selective"}),
    (2, {"context": 2, "recompute": "full"}),
    (2, {"pipeline": 2}),
    (2, {"pipeline": 2, "virtual_stages": 2}),
    (4, {"pipeline": 4}),
    (2, {"zero": 1}),
    (2, {"zero": 2}),
    (2, {"zero": 2, "reduce": "step"}),
    (2, {"zero": 3}),
    (2, {"zero": 3, "reduce": "step"}),
    (2, {"zero": 3, "gather": "microbatch"}),
    (2, {"zero": 3, "gather": "microbatch", "recompute": "full"}),
    (4, {"pipeline": 2, "zero": 2}),
    (4, {"pipeline": 2, "zero": 3, "gather": "step", "reduce": "step"}),
    (4, {"pipeline": 2, "zero": 3, "gather": "step", "reduce": "microbatch"}),
    (4, {"pipeline": 2, "zero": 3, "gather": "microbatch", "reduce": "step"}),
    (4, {"pipeline": 2, "zero": 3, "gather": "microbatch", "reduce": "microbatch"}),
    (4, {"pipeline": 2, "virtual_stages": 2, "zero": 2}),
    (4, {"pipeline": 2, "virtual_stages": 2, "zero": 3}),
    (4, {"pipeline": 2, "virtual_stages": 2, "zero": 3, "reduce": "step"}),
    (4, {"pipeline": 2, "tensor": 2, "sequence": True, "virtual_stages": 2}),
    (4, {"tensor": 2, "sequence": True, "zero": 2}),
    (4, {"tensor": 2, "sequence": True, "context": 2, "zero": 3}),
    (4, {"pipeline": 2, "context": 2, "zero": 3, "gather": "microbatch"}),
    (8, {"tensor": 2, "pipeline": 2, "zero": 3}),
    (8, {"tensor": 2, "pipeline": 2, "context": 2, "sequence": True, "zero": 3, "recompute": "full"}),
]


def layout_recipe(world_size, parallel, num_micro_batches=4, **sections):
    """`num_micro_batches` on each data rank."""
    ranks = world_size // (parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("context", 1))
    return recipe(parallel=parallel, batch={"global_samples": num_micro_batches * ranks}, **sections)


def with_buckets(folder, **sizes):
    """A DeepSpeed configuration with these sizes of zero_optimization."""
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": sizes}))
    return str(path)


def check(world, config):
    """Every rank's calls and bytes are those of the formulas; returns the rows of all ranks."""
    ranks = world.run(step_calls, config)
    rows = compare_ranks(config, ranks)
    assert sum(len(own) for own in rows) >= len(ranks)
    for rank, own in enumerate(rows):
        assert all(row.right for row in own), (rank, own)
    assert all(sum(map(is_small, calls)) <= 4 for calls in ranks)
    return rows


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS, ids=str)
def test_counted_is_planned(worlds, world_size, parallel):
    check(worlds(world_size), layout_recipe(world_size, parallel))


@pytest.mark.parametrize("parallel", [{"tensor": 2, "sequence": True, "zero": 1}, {"pipeline": 2, "zero": 3}], ids=str)
def test_counted_is_planned_in_bf16(worlds, parallel):
    check(worlds(4), layout_recipe(4, parallel, precision="bf16"))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_gradients_reduced_in_fp32_take_twice_the_bytes(worlds, tmp_path, zero):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"communication_data_type": "bf16"}))
    sizes = []
    for file in (str(path), None):
        (rows, _) = check(worlds(2), layout_recipe(2, {"zero": zero}, precision="bf16", deepspeed_config=file))
        sizes.append(next(row.bytes for row in rows if row.kind in ("all-reduce", "reduce-scatter")))
    assert sizes[1] == 2 * sizes[0]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_small_buckets(worlds, tmp_path, zero):
    """Buckets and prefetches that hold a fraction of the stage: as many bytes, and calls within the bounds."""
    sizes = {"reduce_bucket_size": 4000, "stage3_prefetch_bucket_size": 4000}
    config = layout_recipe(4, {"pipeline": 2, "zero": zero}, deepspeed_config=with_buckets(tmp_path, **sizes))
    for rows in check(worlds(4), config):
        (reduction,) = (row for row in rows if row.kind in ("all-reduce", "reduce-scatter"))
        assert reduction.calls > (1 if zero == 1 else 4)


@pytest.mark.parametrize(("gather", "times"), [("step", 1), ("microbatch", 2 * 4)])
def test_without_prefetch_each_use_gathers(worlds, tmp_path, gather, times):
    """gather: microbatch takes two gathers of everything a micro-batch where no prefetch finds it still there."""
    file = with_buckets(tmp_path, stage3_prefetch_bucket_size=0)
    config = layout_recipe(2, {"zero": 3, "gather": gather}, deepspeed_config=file)
    for rows in check(worlds(2), config):
        (row,) = (row for row in rows if row.kind == "all-gather")
        assert row.bytes == row.planned_bytes[1] == times * row.planned_bytes[0]


@pytest.mark.parametrize("reduce", ["step", "microbatch"])
@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_one_gather_a_parameter_and_step(worlds, reduce, pipeline, virtual):
    """gather: step, in every schedule; when a module comes to run its parameters have been asked for before."""
    world_size = 4 if pipeline < 4 else 8
    parallel = {"pipeline": pipeline, "virtual_stages": virtual, "zero": 3, "reduce": reduce}
    config = layout_recipe(world_size, parallel)
    layers = [len(stage) for stage in fit(config, world_size).stages]
    ranks = worlds(world_size).run(step_fetches, config)
    for rank, (gathers, late, _) in enumerate(ranks):
        stage = rank // (world_size // pipeline)
        ends = (stage == 0) + 2 * (stage == pipeline - 1)
        assert gathers == [1] * (9 * sum(layers[stage::pipeline]) + ends)
        assert late == 0


def test_a_small_prefetch_is_ahead_of_use_too(worlds, tmp_path):
    """Half a block is enough for two: each module finds its parameters asked for by those before it."""
    file = with_buckets(tmp_path, stage3_prefetch_bucket_size=4000)
    config = layout_recipe(4, {"pipeline": 2, "zero": 3}, deepspeed_config=file)
    for gathers, late, modules in worlds(4).run(step_fetches, config):
        assert set(gathers) == {1}
        assert late == 0 < modules


@pytest.mark.parametrize("gather", ["step", "microbatch"])
@pytest.mark.parametrize(("blocks", "all_ahead"), [(1, True), (1 / 4, False)])
def test_a_prefetch_of_a_block_is_ahead_however_many_there_are(worlds, tmp_path, gather, blocks, all_ahead):
    """The least that the engine fills in; a large block in DeepSpeed's default bucket is like the quarter."""
    parallel = {"tensor": 2, "zero": 3, "gather": gather}
    config = layout_recipe(4, parallel, model={"layers": 12})
    size = int(blocks * block_parameters(config.model, tensor=2))
    file = with_buckets(tmp_path, stage3_prefetch_bucket_size=size)
    for _, late, modules in worlds(4).run(step_fetches, config.model_copy(update={"deepspeed_config": file})):
        assert modules == 12 + 3
        assert late == 0 if all_ahead else late > 5


def test_nothing_is_asked_for_ahead_without_prefetch(worlds, tmp_path):
    """What the two tests above would see if nothing were prefetched."""
    file = with_buckets(tmp_path, stage3_prefetch_bucket_size=0)
    config = layout_recipe(4, {"pipeline": 2, "zero": 3}, deepspeed_config=file)
    for _, late, modules in worlds(4).run(step_fetches, config):
        assert late == modules > 1


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("pipeline", "virtual"), [(2, 1), (2, 2)])
def test_two_gathers_a_micro_batch(worlds, pipeline, virtual, recompute):
    """gather: microbatch, at most; a block that runs its forward again does so with what its backward gathered."""
    parallel = {"pipeline": pipeline, "virtual_stages": virtual, "zero": 3, "gather": "microbatch"}
    for gathers, _, _ in worlds(4).run(step_fetches, layout_recipe(4, {**parallel, "recompute": recompute})):
        assert 1 < max(gathers) <= 2 * 4


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(4, {"tensor": 2, "sequence": True, "zero": 3}), (4, {"pipeline": 2, "zero": 2}), (2, {"zero": 1})],
    ids=str,
)
def test_nothing_is_missed(worlds, world_size, parallel):
    """What the process groups are asked for is what the dispatcher sees as operators, DeepSpeed's calls among them."""
    for counted, seen in worlds(world_size).run(counted_twice, layout_recipe(world_size, parallel)):
        assert counted == seen
        assert sum(counted.values()) > 10


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, {"tensor": 2}), (4, {"pipeline": 2, "zero": 1}), (4, {"pipeline": 2, "zero": 3}), (8, {"tensor": 2, "pipeline": 2})],
    ids=str,
)
@pytest.mark.parametrize("clip", [0, 0.5])
def test_clipping_and_logging_cost_a_few_small_ones(worlds, world_size, parallel, clip):
    """Norm, label counts, losses and requests: as many for two micro-batches of four layers as for four of eight."""
    small = []
    for layers, num_micro_batches in ((4, 2), (8, 4)):
        config = layout_recipe(
            world_size, parallel, num_micro_batches, model={"layers": layers}, optimizer={"clip": clip}
        )
        ranks = worlds(world_size).run(trainer_calls, config)
        assert all(all(row.right for row in rows) for rows in compare_ranks(config, ranks))
        small.append([[(call.axis, call.kind, call.elements) for call in calls if is_small(call)] for calls in ranks])
    assert small[0] == small[1]
    for calls in small[0]:
        assert 2 <= len(calls) <= 6
        assert sum(elements for _, _, elements in calls) < 32
