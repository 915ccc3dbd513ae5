"""What can come between a run and its checkpoints' disk: one clear line, and the last good one stays."""

import gc
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.disks import small_disk
from support.saving import ALONE, NUM_BYTES, PARTS, assert_whole, config, held, save_step

from megacode.checkpoint import keep
from megacode.checkpoint.keep import newest
from megacode.checkpoint.reader import CheckpointReader, Progress, sealed
from megacode.checkpoint.store import Share, begin, finish, step_folder
from megacode.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own, with room for a checkpoint and a half."""
    with small_disk(tmp_path / "disk", 3 * NUM_BYTES // 2) as folder:
        yield folder


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_refused(run, error, message):
    """One line that says what is wrong and which checkpoint is left."""
    assert message in str(error.value)
    assert str(error.value).endswith(f"then start again; {step_folder(run, 1)} is the run's last good one")
    assert "\n" not in str(error.value)


def test_a_full_disk(disk):
    save_step(disk, 1)
    with pytest.raises(UserError) as error:
        save_step(disk, 2)
    path = disk / "checkpoints/step_00000002.partial/optimizer_00000.safetensors"
    assert_refused(disk, error, f"{path}: No space left on device; make room on that disk")
    assert names(disk) == ["latest", "step_00000001"], "what was written must give the room back"
    assert_whole(newest(disk))


def test_a_disk_that_has_become_read_only(disk):
    save_step(disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(UserError) as error:
        save_step(disk, 2)
    assert_refused(disk, error, "step_00000002.partial: Read-only file system; mend its mode")
    assert_whole(newest(disk))


def test_a_disk_that_is_unmounted_while_a_checkpoint_is_written(disk):
    folder = step_folder(disk, 2)
    share = Share(PARTS, held(2), ALONE)
    share.copy()
    begin(folder, ALONE)
    subprocess.run(["umount", "-l", disk], check=True)
    with pytest.raises(UserError, match=r"weights_00000.safetensors: No such file or directory; bring its disk back"):
        finish(folder, config(disk), Progress(2, 16, 2, 7, 16, 0), share.write(folder), ALONE)
    assert not (disk / "checkpoints").exists(), "nothing may come up on the disk below"


@pytest.mark.parametrize("name", [".", "gone"])
def test_a_run_folder_that_is_not_the_runs_or_gone_is_not_written_to(tmp_path, name):
    run = tmp_path / name
    with pytest.raises(UserError, match=r"recipe.yaml: No such file or directory; bring its disk back"):
        begin(step_folder(run, 1), ALONE, must_hold=run / "recipe.yaml")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_shorter_than_what_was_written_is_no_checkpoint(tmp_path):
    folder = step_folder(tmp_path, 1)
    share = Share(PARTS, held(1), ALONE)
    share.copy()
    begin(folder, ALONE)
    report = share.write(folder)
    os.truncate(folder.with_name(folder.name + ".partial") / "weights_00000.safetensors", 100)
    with pytest.raises(UserError, match=r"weights_00000.safetensors has 100 bytes where \d+ were written"):
        finish(folder, config(tmp_path), Progress(1, 8, 1, 7, 16, 0), report, ALONE)
    assert newest(tmp_path) is None


def test_what_a_killed_run_left_goes_at_the_next_save_of_the_step_and_at_the_next_start(tmp_path):
    for step in (1, 2):
        begin(step_folder(tmp_path, step), ALONE)
        (tmp_path / f"checkpoints/step_{step:08d}.partial/weights_00007.safetensors").write_bytes(b"half")
    save_step(tmp_path, 1)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002.partial"]
    assert "weights_00007.safetensors" not in [path.name for path in newest(tmp_path).iterdir()]
    shutil.copytree(newest(tmp_path), tmp_path / "checkpoints/.step_00000000.removed")
    keep.sweep(tmp_path)
    assert names(tmp_path) == ["latest", "step_00000001"]


@pytest.mark.parametrize(
    ("last", "every", "left"),
    [(1, None, [8]), (3, None, [6, 7, 8]), (1, 3, [3, 6, 8]), (2, 1, [*range(1, 9)]), (9, 5, [*range(1, 9)])],
)  # fmt: skip
def test_which_are_kept(tmp_path, last, every, left):
    for step in range(1, 9):
        step_folder(tmp_path, step).mkdir(parents=True)
        (step_folder(tmp_path, step) / "manifest.json").write_text("{}")
    step_folder(tmp_path, 9).with_name("step_00000009.partial").mkdir()
    for folder in keep.surplus(tmp_path, last, every):
        keep.remove(folder)
    assert [keep.step_of(folder) for folder in keep.finished(tmp_path)] == left
    assert (tmp_path / "checkpoints/step_00000009.partial").exists()


def test_half_removed_is_no_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        save_step(tmp_path, step)

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.unlink", fail)
        with pytest.raises(OSError, match="Input/output"):
            keep.remove(step_folder(tmp_path, 1))
    assert keep.finished(tmp_path) == [step_folder(tmp_path, 2)]
    keep.remove(step_folder(tmp_path, 1))  # another has been there before
    keep.sweep(tmp_path)
    assert names(tmp_path) == ["latest", "step_00000002"]


def test_a_link_to_a_checkpoint_elsewhere_is_removed_and_not_what_it_points_to(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        save_step(run, step)
    os.rename(step_folder(run, 1), tmp_path / "elsewhere")
    step_folder(run, 1).symlink_to(tmp_path / "elsewhere")
    for folder in keep.surplus(run, last=1):
        keep.remove(folder)
    assert names(run) == ["latest", "step_00000002"]
    (run / "checkpoints/.step_00000001.removed").symlink_to(tmp_path / "elsewhere")
    keep.sweep(run)
    assert names(run) == ["latest", "step_00000002"]
    assert (tmp_path / "elsewhere/manifest.json").exists()


@pytest.mark.parametrize("text", ["step_00000001\n", "step_00000003\n", None])
def test_a_start_has_latest_name_the_newest(tmp_path, text):
    """A kill came before it was moved; or what it names was removed."""
    for step in (1, 2):
        save_step(tmp_path, step)
    latest = tmp_path / "checkpoints/latest"
    latest.unlink()
    if text is not None:
        latest.write_text(text)
    keep.sweep(tmp_path)
    assert latest.read_text() == "step_00000002\n"


def test_names_come_after_contents(tmp_path, monkeypatch):
    """A power loss must leave no name without its content, and take none that `latest` has been told of."""
    order, sizes = [], {}
    fsync, replace = os.fsync, os.replace

    def record(file):
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        order.append(f"{path.relative_to(tmp_path)}")
        sizes[path.name] = os.fstat(file).st_size
        fsync(file)

    def rename(old, new):
        order.append(f"-> {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", rename)
    save_step(tmp_path, 1)
    partial, folder = "checkpoints/step_00000001.partial", step_folder(tmp_path, 1)
    place = order.index("-> step_00000001")
    files = {f"{partial}/{path.name}" for path in folder.iterdir()}
    assert len(files) == 5
    assert order[0] == ".", "RUN/checkpoints itself"
    assert set(order[1 : place - 1]) == files
    assert all(sizes[path.name] == path.stat().st_size for path in folder.iterdir()), "synced before all was written"
    assert order[place - 1] == partial
    assert order[place + 1 :] == ["checkpoints", "checkpoints/.latest.tmp", "-> latest", "checkpoints"]


def test_pinned_memory_is_given_back_with_the_share(monkeypatch):
    calls = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda *args: calls.append(("register", *args)) or 0,
        cudaHostUnregister=lambda *args: calls.append(("unregister", *args)) or 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda error: None)
    share = Share(PARTS, held(1), ALONE, pinned=True)
    pointer = next(iter(share.values.values())).data_ptr()
    assert calls == [("register", pointer, share.num_bytes, 0)]
    del share
    gc.collect()
    assert calls[1:] == [("unregister", pointer)]


def test_a_shard_that_the_manifest_does_not_name_is_missing(tmp_path):
    save_step(tmp_path, 1)
    manifest = json.loads((newest(tmp_path) / "manifest.json").read_text())
    del manifest["files"]["optimizer_00000.safetensors"]
    (newest(tmp_path) / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(UserError, match=r"manifest.json names no optimizer_00000.safetensors; the run has no earlier"):
        CheckpointReader(newest(tmp_path)).verify()


def test_reading_runs_no_pickle(tmp_path, monkeypatch):
    save_step(tmp_path, 3)

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle is read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert_whole(newest(tmp_path))
    for name in (
        "checkpoint/reader",
        "checkpoint/store",
        "checkpoint/keep",
        "checkpoint/origin",
        "checkpoint/tensorfile",
        "train/start",
    ):
        text = (ROOT / f"megacode/{name}.py").read_text()
        assert not [word for word in ("import pickle", "torch.load") if word in text]
