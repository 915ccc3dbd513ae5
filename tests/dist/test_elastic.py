"""Checkpoints know no layout: what one layout saved, any other loads and saves again without changing a bit."""

import itertools

import pytest
import torch
from support.training import move, parallel, recipe

from megacode.checkpoint.reader import STATES, CheckpointReader
from megacode.checkpoint.store import step_folder

MODEL = {"layers": 6, "heads": 8, "kv_heads": 4, "vocabulary": 61}
"""61 rows over 2 or 4 tensor ranks need padding, which no file may hold."""
SP = {"sequence": True}
OFFLOAD = {"deepspeed_config": "ds_configs/zero3_offload.json"}

JOURNEY = [
    (8, {"tensor": 2, "pipeline": 2, "zero": 3}, {}),
    (1, {"zero": 1}, {}),
    (8, {"tensor": 4, "pipeline": 2, "zero": 1, **SP}, {}),
    (6, {"pipeline": 3, "virtual_stages": 2, "zero": 2}, {"batch": {"global_samples": 6}}),
    (4, {"tensor": 2, "context": 2, "zero": 3, "gather": "microbatch"}, {}),
    (2, {"zero": 3}, OFFLOAD),
    (8, {"pipeline": 4, "zero": 2, "stages": [1, 2, 2, 1]}, {}),
    (4, {"tensor": 4, "zero": 2, **SP}, {}),
    (8, {"tensor": 2, "pipeline": 2, "virtual_stages": 3, "zero": 1}, {}),
    (6, {"tensor": 2, "pipeline": 3, "zero": 3, "stages": "weighed", **SP}, {"batch": {"global_samples": 6}}),
    (8, {"context": 4, "pipeline": 2, "zero": 1}, {}),
    (8, {"zero": 3}, {}),
    (8, {"tensor": 2, "context": 2, "pipeline": 2, "virtual_stages": 2, "zero": 2, **SP}, {}),
    (2, {"tensor": 2, "zero": 1}, {}),
    (8, {"tensor": 2, "pipeline": 2, "zero": 3}, {}),
]  # fmt: skip
"""(processes, parallel section, other sections), from one to the next. Each kind of sharding is left and entered: 1, 2
and 4 tensor ranks, with and without sequence parallelism; 1 to 4 stages, interleaved, uneven; context; ZeRO 1, 2, 3;
offload."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """(layout, sections) -> recipe of one run folder."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "tokenizer.model").write_bytes(b"any")

    def build(layout, sections):
        common = {"model": MODEL, "tokenizer": {"path": str(folder / "tokenizer.model")}, "run": str(folder)}
        return recipe(parallel=layout, **common, **sections)

    build.folder = folder
    return build


@pytest.fixture(scope="module")
def saved(worlds, config):
    """Checkpoint 0 of the journey: after two steps, so that weights and moments are no round numbers."""
    world_size, layout, sections = JOURNEY[0]
    folder = step_folder(config.folder / "journey_0", 2)
    worlds(world_size).run(parallel, config(layout, sections), 2, (), None, folder)
    return folder


def assert_same(have, want):
    assert (have.names, have.progress) == (want.names, want.progress)
    for name, key in itertools.product(want.names, ("weight", *STATES)):
        assert torch.equal(have.read(name, key), want.read(name, key)), (name, key)


def test_no_layout_changes_a_bit(worlds, config, saved):
    want, source = CheckpointReader(saved), saved
    assert all(float(want.read(name, key).norm()) > 0 for name in want.names for key in STATES)
    for number, (world_size, layout, sections) in enumerate(JOURNEY[1:], start=1):
        target = step_folder(config.folder / f"journey_{number}", 2)
        counts = worlds(world_size).run(move, config(layout, sections), source, target)
        assert set(counts) == {2}, "Adam's step count, by which its bias correction goes on"
        have = CheckpointReader(target)
        have.verify()
        assert_same(have, want)
        source = target
    # Back in the layout of the beginning: the same files, byte for byte.
    assert CheckpointReader(source).manifest["files"] == want.manifest["files"]


def test_padding_is_in_no_file(saved):
    reader = CheckpointReader(saved)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        slices = reader.manifest["tensors"][name]["slices"]
        assert sorted((piece["start"], piece["stop"]) for piece in slices) == [(0, 32), (32, 61)]
