"""Checkpoints are written while the run goes on; what comes between is said by all ranks at once, in one line."""

import json
import subprocess

import pytest
from support import savers
from support.disks import small_disk
from support.launching import ROOT, metrics, start, status, told, train, write_recipe
from support.saving import assert_whole
from support.training import recipe as nano
from support.training import snapshots

from megacode.checkpoint.keep import finished, newest, step_of
from megacode.checkpoint.reader import CheckpointReader
from megacode.recipe import load
from megacode.checkpoint.origin import checkpoint_bytes, open_tokenizer


def test_steps_go_on_while_a_checkpoint_is_written(worlds, tmp_path):
    results = worlds(2).run(savers.go_on, tmp_path)
    while_held, stood, step, events = results[0]
    assert [each[:3] for each in results] == [([], ["step_00000001"], step)] * 2
    assert [step_of(folder) for folder in finished(tmp_path)] == [1, step - 2, step - 1, step]
    for folder in finished(tmp_path):
        assert_whole(folder)
    assert (tmp_path / "checkpoints/latest").read_text() == f"step_{step:08d}\n"
    (wait,) = (values["text"] for event, _, values in events if event == "checkpoint_wait")
    assert wait.startswith(f"step {step - 1}: waits until the checkpoint of step {step - 2} is written")
    saved = [(at, values) for event, at, values in events if event == "checkpoint"]
    assert [at for at, _ in saved] == [1, step - 2, step - 1, step]
    assert saved[0][1]["blocked_seconds"] < saved[0][1]["seconds"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_writer_that_fails_is_told_by_all_ranks_in_a_line(worlds, tmp_path, rank):
    (message, step), other = worlds(2).run(savers.fail, tmp_path, rank)
    assert other == (message, step)
    path = tmp_path / f"checkpoints/step_00000002.partial/weights_{rank:05d}.safetensors"
    assert message == (
        f"the checkpoint {tmp_path}/checkpoints/step_00000002 could not be written: {path}: No space left on device; "
        f"make room on that disk, then start again; {tmp_path}/checkpoints/step_00000001 is the run's last good one"
    )
    assert sorted(each.name for each in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    assert_whole(newest(tmp_path))


@pytest.fixture(scope="module")
def offload(tmp_path_factory):
    """DeepSpeed file of a stage of ZeRO with the optimizer in host memory."""
    folder = tmp_path_factory.mktemp("offload")

    def write(zero):
        path = folder / f"zero{zero}.json"
        content = json.loads((ROOT / f"ds_configs/zero{zero}.json").read_text())
        content["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        path.write_text(json.dumps(content))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("layout", "offloaded"),
    [
        ({"zero": 1}, False), ({"zero": 2, "tensor": 2}, False), ({"zero": 3}, False),
        ({"zero": 3, "tensor": 2}, False), ({"zero": 1, "pipeline": 2}, False), ({"zero": 1}, True),
        ({"zero": 2}, True),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_kept_is_what_the_engine_has(worlds, offload, layout, offloaded):
    """Bit for bit what DeepSpeed's own calls give to every rank, each tensor on one of them."""
    config = {"deepspeed_config": offload(layout["zero"])} if offloaded else {}
    ranks = worlds(4).run(snapshots, nano(parallel=layout, **config))
    kept = sum((kept for kept, _ in ranks), [])
    assert all(equal for _, equal in ranks)
    whole = 3 * (3 + 4 * 9) if layout.get("tensor", 1) == 1 else 3 * (2 * (2 + 4 * 7) + 1 + 4 * 2)
    assert len(kept) == whole
    assert max(len(kept) for kept, _ in ranks) < 0.7 * whole


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("saver"))


def test_a_run_keeps_what_it_should_and_its_losses(recipe):
    """Bit for bit those of a run that saves once."""
    often, seldom = (recipe.parent / name for name in ("often", "seldom"))
    code, output = train(recipe, f"run={often}", "checkpoint={every_steps: 1, keep_last: 2, keep_every: 3}")
    assert code == 0, output[-3000:]
    assert train(recipe, f"run={seldom}", "checkpoint.every_steps=100")[0] == 0
    assert [step_of(folder) for folder in finished(often)] == [3, 6, 7, 8]
    assert not list((often / "checkpoints").glob(".*"))
    figures = [[(line["loss"], line["grad_norm"]) for line in metrics(run) if "loss" in line] for run in (often, seldom)]
    assert figures[0] == figures[1]
    ours, theirs = (CheckpointReader(newest(run)).manifest["files"] for run in (often, seldom))
    assert ours == theirs
    events = [json.loads(line) for line in (often / "events.jsonl").read_text().splitlines()]
    saved = [event for event in events if event["event"] == "checkpoint"]
    assert [event["step"] for event in saved] == list(range(1, 9))
    assert all(0 < event["blocked_seconds"] <= event["seconds"] for event in saved)


@pytest.fixture
def disk(recipe, tmp_path):
    """A folder on a disk of its own, with room for a checkpoint and most of another."""
    _, config = open_tokenizer(load(recipe))
    with small_disk(tmp_path / "disk", 17 * checkpoint_bytes(config) // 10) as folder:
        yield folder


def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_its_last_checkpoint(recipe, disk):
    run = disk / "run"
    line = told(*train(recipe, f"run={run}", "checkpoint.every_steps=2"))
    assert "No space left on device; make room on that disk, then start again" in line
    assert line.endswith(f"{run}/checkpoints/step_00000002 is the run's last good one")
    assert (status(run)["outcome"], status(run)["message"]) == ("failed", line)
    assert status(run)["checkpoint"] == f"{run}/checkpoints/step_00000002"
    CheckpointReader(newest(run)).verify()
    assert step_of(newest(run)) == 2
    assert not list((run / "checkpoints").glob("*.partial"))


def test_a_disk_that_vanishes_ends_the_run_with_one_line_and_nothing_comes_up_below(recipe, disk):
    with start(recipe, f"run={disk}/run", "checkpoint.every_steps=4") as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 2/"):
                subprocess.run(["umount", "-l", disk], check=True)
        code = process.wait(timeout=60)
    message = told(code, "".join(lines))
    assert f"{disk}/run/recipe.yaml: No such file or directory; bring its disk back (is it mounted?)" in message
    assert not list(disk.iterdir())
