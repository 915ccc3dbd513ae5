"""The record of a rank: what is written into it, what others read, and when nothing is written."""

import os
import threading

import pytest
import torch

from megacode.parallel import heartbeat, phases
from megacode.parallel.heartbeat import PARTS, add_phases, begin_step, communicating, doing, finishing, read, waiting


@pytest.fixture
def path(tmp_path):
    yield tmp_path / "rank_00003"
    heartbeat.end()
    phases.stop_recording()


@pytest.fixture
def heart(path):
    return heartbeat.begin(path, 3, os.getpid(), 17, "host")


def test_a_new_record(heart, path):
    record = read(path)
    assert (record.rank, record.pid, record.started, record.host) == (3, os.getpid(), 17, "host")
    assert (record.state, record.step, record.kind, record.peer) == ("starting", 0, "", -1)
    assert set(record.entered.values()) == {0}


def test_what_a_rank_does(heart, path):
    before = read(path)
    begin_step(7)
    doing("writing a checkpoint", patient=True)
    record = read(path)
    assert (record.step, record.state, record.patient) == (7, "writing a checkpoint", True)
    assert record.changes > before.changes
    doing("reading data")
    assert not read(path).patient


def test_communication_is_entered_counted_and_left(heart, path):
    with communicating("all-reduce", "tensor"):
        outer = read(path)
        with communicating("receive", peer=2):
            inner = read(path)
        again = read(path)
    after = read(path)
    assert (outer.kind, outer.axis, outer.peer, outer.entered["tensor"]) == ("all-reduce", "tensor", -1, 1)
    assert (inner.kind, inner.axis, inner.peer, inner.entered["tensor"]) == ("receive", "", 2, 1)
    assert (again.kind, again.axis, again.peer) == ("all-reduce", "tensor", -1)
    assert (after.kind, after.axis, after.entered["tensor"]) == ("", "", 1)


def test_a_collective_that_was_counted_is_not_counted_again(heart, path):
    with waiting("all-gather", "data"):
        pass
    with finishing("all-gather", "data"):
        assert read(path).kind == "all-gather"
    assert read(path).entered["data"] == 1


def test_an_error_within_leaves_the_communication(heart, path):
    with pytest.raises(ValueError, match="x"), communicating("barrier", "world"):
        raise ValueError("x")
    assert read(path).kind == ""


def test_communication_is_a_phase_with_and_without_a_heartbeat(path):
    for begun in (False, True):
        recorder = phases.record(torch.device("cpu"))
        if begun:
            heartbeat.begin(path, 3, 1, 1, "host")
        with communicating("all-reduce", "world"):
            threading.Event().wait(0.02)
        with waiting("all-reduce", "world"):
            threading.Event().wait(0.02)
        seconds = recorder.take()
        assert 0.02 <= seconds["communication"] < seconds["communication"] + seconds["other"]
        assert seconds["other"] >= 0.02


def test_phases_are_summed(heart, path):
    for number in (1, 2):
        add_phases(dict.fromkeys(PARTS, number / 4))
    record = read(path)
    assert record.steps == 2
    assert record.seconds == dict.fromkeys(PARTS, 0.75)


def test_beats_are_no_changes(heart, path):
    before = read(path)
    heart.beat()
    after = read(path)
    assert (after.beats, after.changes) == (before.beats + 1, before.changes)


def test_texts_are_cut_where_they_are_too_long(heart, path):
    doing("é" * 60)
    assert read(path).state.startswith("é" * 40)


def test_nothing_is_written_while_nobody_has_begun(path):
    doing("reading data")
    begin_step(2)
    add_phases(dict.fromkeys(PARTS, 1.0))
    with communicating("all-reduce", "tensor"), waiting("barrier", "world"), finishing("all-gather", "data"):
        pass
    assert read(path) is None
    assert not list(path.parent.iterdir())


def test_a_file_that_another_process_has_mapped_is_replaced_not_shortened(heart, path):
    inode = path.stat().st_ino
    kept = path.open("rb")
    heartbeat.begin(path, 3, 1, 1, "host")
    assert path.stat().st_ino != inode
    assert len(kept.read()) > 0
    kept.close()


def test_half_a_file_is_no_record(path):
    path.write_bytes(b"\0" * 20)
    assert read(path) is None


def test_who_takes_something_up_in_a_process_that_ends_stands_still(heart, path):
    doing("reading data")
    heart.halted = True
    main = threading.Thread(target=doing, args=("writing a checkpoint",), daemon=True)
    main.start()
    main.join(timeout=0.2)
    assert main.is_alive()
    assert read(path).state == "reading data"
    heart.halted = False
    main.join(timeout=5)
    assert read(path).state == "writing a checkpoint"
