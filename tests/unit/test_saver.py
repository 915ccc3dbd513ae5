"""What a run's saver does on one rank: removing, telling, and what goes wrong once a checkpoint stands."""

import threading

import pytest
from support.saving import ALONE, PARTS, config, held

from megacode.checkpoint import keep
from megacode.checkpoint.reader import Progress
from megacode.checkpoint.tensorfile import TensorFile
from megacode.errors import UserError
from megacode.train import saver
from megacode.train.saver import Saver


class Book:
    """A journal that keeps events."""

    def __init__(self):
        self.events = []

    def event(self, event, step, text, **values):
        self.events.append((event, step, text))

    def of(self, kind):
        return [text for event, _, text in self.events if event == kind]


@pytest.fixture
def make(tmp_path):
    """Saver of a run with such a `checkpoint` section."""

    def build(**section):
        (tmp_path / "recipe.yaml").touch()
        return Saver(config(tmp_path, **section), PARTS, held(1), ALONE, Book(), lambda: None, pinned=False)

    return build


def save(it, *steps):
    for step in steps:
        it.save(Progress(step, 0, step, 7, 16, 0))


def steps_of(run):
    return [keep.step_of(folder) for folder in keep.finished(run)]


def test_a_removal_that_hangs_holds_up_nobody(make, tmp_path, monkeypatch):
    it, go, remove = make(keep_last=1), threading.Event(), keep.remove
    monkeypatch.setattr(keep, "remove", lambda folder: go.wait(60) and remove(folder))
    for step in (1, 2, 3, 4):
        save(it, step)
        it.wait(step)
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    go.set()
    it.close()
    assert steps_of(tmp_path) == [4]


def test_the_end_of_a_run_does_not_wait_for_ever(make, monkeypatch):
    it, go = make(keep_last=1), threading.Event()
    monkeypatch.setattr(keep, "remove", lambda folder: go.wait(60))
    monkeypatch.setattr(saver, "REMOVING_SECONDS", 0.1)
    for step in (1, 2):
        save(it, step)
        it.wait(step)
    it.close()
    assert it._pruning.is_alive()
    go.set()


def test_what_cannot_be_removed_is_told_and_the_rest_removed(make, tmp_path, monkeypatch):
    it, remove = make(), keep.remove
    save(it, 1, 2, 3)
    it.wait(3)

    def fail(folder):
        if keep.step_of(folder) == 1:
            raise OSError("Cannot do that")
        remove(folder)

    monkeypatch.setattr(keep, "remove", fail)
    it._remove_surplus(3, last=1)
    assert it.journal.of("prune") == [
        f"step 3: {tmp_path}/checkpoints/step_00000001 could not be removed: Cannot do that"
    ]

    def full(*args, **values):
        raise UserError("the journal's disk is full")

    it.journal.event = full
    it._remove_surplus(3, last=1)  # in a thread: nobody would catch it
    assert steps_of(tmp_path) == [1, 3]


@pytest.mark.parametrize(("steps", "told"), [((1000, 2000), True), ((1000, 1001), False), ((999, 1000), False)])
def test_only_an_interval_that_is_too_short_is_told(make, monkeypatch, steps, told):
    it, go, write = make(every_steps=1000), threading.Event(), TensorFile.write
    monkeypatch.setattr(TensorFile, "write", lambda *args: go.wait(60) and write(*args))
    it.save(Progress(steps[0], 0, steps[0], 7, 16, 0))
    threading.Timer(0.1, go.set).start()
    save(it, steps[1])
    it.wait(steps[1])
    assert len(it.journal.of("checkpoint_wait")) == told


def test_trouble_after_the_name_is_told_and_ends_nothing(make, tmp_path, monkeypatch):
    it, point_to = make(keep_last=1), keep.point_to
    save(it, 1)
    it.wait(1)

    def fail(folder):
        raise OSError(122, "Disk quota exceeded", str(folder.with_name(".latest.tmp")))

    monkeypatch.setattr(keep, "point_to", fail)
    save(it, 2)
    it.wait(2)
    it.close()
    (told,) = it.journal.of("checkpoint_trouble")
    assert told.startswith(f"step 2: {tmp_path}/checkpoints/step_00000002 stands, and then: ")
    assert told.endswith(".latest.tmp: Disk quota exceeded; make room on that disk")
    assert steps_of(tmp_path) == [1, 2], "its name may not be on the disk"
    monkeypatch.setattr(keep, "point_to", point_to)
    keep.sweep(tmp_path)
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000002\n"
