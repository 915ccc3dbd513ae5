"""Requests, the watch over other ranks, and what is skipped: the parts that need no training."""

import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from megacode.train.faults import FILES, SIGNALS, Peer, PeerWatch, Requests, lost_connection, this_process
from megacode.train.launch import Place
from megacode.train.main import Run
from megacode.train.metrics import begin_status, fail_status, has_failed, read_outcome, write_status
from megacode.train.verdict import Verdict


@pytest.fixture
def handlers():
    """Signal handlers as they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def asked(requests: Requests, step: int = 5):
    return requests.agree(requests.noted(step).tolist())


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_stop(tmp_path, handlers, number):
    requests = Requests(tmp_path, looks=False)
    requests.listen()
    assert asked(requests).stop is None
    os.kill(os.getpid(), number)
    assert asked(requests).stop == signal.Signals(number).name


def test_a_warning_while_the_interpreter_ends_does_not_kill_it():
    """Python gives handlers of its own back to the system then, and not what is ignored."""
    program = """
import os, signal, sys
from pathlib import Path
from megacode.train.faults import Requests
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1):
        kill(pid, number)
requests = Requests(Path("."), looks=False)
requests.listen()
requests.rest()
sys.last = Last()  # goes when handlers are gone
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_second_ctrl_c_ends_at_once(tmp_path, handlers):
    requests = Requests(tmp_path, looks=False)
    requests.listen()
    os.kill(os.getpid(), signal.SIGINT)
    assert asked(requests).stop == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_files_ask_and_go_when_it_is_done(tmp_path):
    requests = Requests(tmp_path, looks=True)
    assert asked(requests) == asked(Requests(tmp_path, looks=False))
    for name in FILES:
        (tmp_path / name).touch()
    assert asked(Requests(tmp_path, looks=True)).stop is None  # `echo 5000 > STOP` makes it empty first
    for name in FILES:
        os.utime(tmp_path / name, (0, 0))
    requests = Requests(tmp_path, looks=True)
    both = asked(requests)
    assert both.stop == f"the file {tmp_path}/STOP"
    assert both.save
    requests.take(both)
    assert asked(requests).stop is None, "it is being obeyed"
    requests.done()
    assert not list(tmp_path.iterdir())
    assert asked(requests).stop is None


def test_a_file_may_name_the_step(tmp_path):
    (tmp_path / "STOP").write_text("7\n")
    requests = Requests(tmp_path, looks=True)
    assert [asked(requests, step).stop is not None for step in (5, 6, 7, 8)] == [False, False, True, True]


def test_a_file_that_holds_no_step_asks_for_nothing_and_is_told_once(tmp_path, capsys):
    (tmp_path / "STOP").write_text("next week\n")
    (tmp_path / "SAVE").write_text("-3")
    requests = Requests(tmp_path, looks=True)
    nothing = asked(Requests(tmp_path, looks=False))
    assert asked(requests) == nothing
    requests._next_look = 0.0
    assert asked(requests) == nothing
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{tmp_path}/STOP is ignored: it holds 'next week'; write the number of a step")
    assert second.startswith(f"{tmp_path}/SAVE is ignored: it holds '-3'; ")
    (tmp_path / "STOP").write_text("5")
    requests._next_look = 0.0
    assert asked(requests, 5).stop is not None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "written", "again", "left", "told"),
    [
        ("", 1, False, False, "asked an earlier run and is removed; write it anew to ask this one"),
        ("7", 1, False, False, "asked an earlier run and is removed; write it anew to ask this one"),
        ("", 1, True, True, "which the job has made by itself: obeyed after the first step"),
        ("8", 1, False, True, "was there before this start: obeyed after step 8"),
        ("", 2, False, True, ""),
        ("7", 2, False, True, ""),
    ],
)
def test_what_is_there_before_a_start_is_told_and_taken_away_if_it_asked_another(
    tmp_path, capsys, text, written, again, left, told
):
    """The start begins at second 2 and goes on from step 7."""
    for name in FILES:
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (written, written))
    Requests(tmp_path, looks=True).clear_old(7, 2_000_000_000, again)
    assert [(tmp_path / name).exists() for name in FILES] == [left] * len(FILES)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (len(FILES) if told else 0)
    assert all(told in line for line in lines)


def test_a_later_save_outlives_an_earlier_stop(tmp_path):
    (tmp_path / "STOP").write_text("3")
    (tmp_path / "SAVE").write_text("5")
    requests = Requests(tmp_path, looks=True)
    requests.take(asked(requests, 3))
    requests.done()
    assert [file.name for file in tmp_path.iterdir()] == ["SAVE"]


def test_a_stop_that_is_still_to_come_outlives_a_signal(tmp_path, handlers):
    (tmp_path / "STOP").write_text("5000")
    requests = Requests(tmp_path, looks=True)
    requests.listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    stop = asked(requests, 10)
    assert stop.stop == "SIGUSR1"
    requests.take(stop)
    requests.done()
    assert (tmp_path / "STOP").read_text() == "5000"


def test_a_file_that_is_written_anew_while_it_is_obeyed_asks_anew(tmp_path):
    (tmp_path / "SAVE").write_text("10")
    requests = Requests(tmp_path, looks=True)
    requests.take(asked(requests, 10))
    (tmp_path / "SAVE").write_text("500")
    requests._next_look = 0.0
    assert not asked(requests, 11).save
    requests.done()
    assert [asked(requests, step).save for step in (12, 500)] == [False, True]


def test_only_one_rank_looks_for_files(tmp_path):
    (tmp_path / "SAVE").write_text("1")
    assert asked(Requests(tmp_path, looks=True)).save
    assert not asked(Requests(tmp_path, looks=False)).save


def test_what_any_rank_noted_counts(tmp_path, handlers):
    one, other = Requests(tmp_path, looks=True), Requests(tmp_path, looks=False)
    other.listen()
    os.kill(os.getpid(), signal.SIGUSR2)
    totals = one.noted(1) + other.noted(1)
    assert one.agree(totals.tolist()) == other.agree(totals.tolist())
    assert one.agree(totals.tolist()).stop == "SIGUSR2"


def watched(peers, rank=0, failed=lambda: False):
    told = threading.Event()
    seen = []

    def on_loss(gone, tells):
        seen.append((gone, tells))
        told.set()

    watch = PeerWatch(peers, rank, failed, on_loss)
    watch.start()
    return watch, told, seen


def sleeper(rank: int):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    me = this_process(rank)
    from megacode.train.faults import Peer, _started

    return process, Peer(rank, me.host, process.pid, _started(process.pid))


def test_a_peer_that_is_killed_is_noticed_although_nobody_fetches_it():
    process, peer = sleeper(1)
    watch, told, seen = watched([this_process(0), peer])
    assert not told.wait(1.5)
    process.kill()
    assert told.wait(10)
    assert [gone.rank for gone in seen[0][0]] == [1]
    assert seen[0][1]  # rank 0 is the lowest that is left
    watch.stop()
    process.wait()


def test_after_stop_peers_may_end():
    process, peer = sleeper(1)
    watch, told, _ = watched([this_process(0), peer])
    watch.stop()
    process.kill()
    process.wait()
    assert not told.wait(2)


def test_peers_elsewhere_or_out_of_sight_are_not_watched():
    process, peer = sleeper(1)
    process.kill()
    process.wait()
    me = this_process(0)
    elsewhere = type(me)(2, "another-host", me.pid, me.started)
    watch, told, _ = watched([me, peer, elsewhere])
    assert watch.peers == []
    assert not told.wait(1.5)
    watch.stop()


def test_a_failure_told_by_other_means_ends_this_rank():
    watch, told, seen = watched([this_process(0)], failed=lambda: True)
    assert told.wait(10)
    assert seen[0][0] == []
    watch.stop()


def test_only_the_first_rank_that_fails_says_why(tmp_path):
    begin_status(tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["outcome"] == "running"
    assert not has_failed(tmp_path, "this start")
    assert fail_status(tmp_path, 3, "the reason", None, "this start")
    assert not fail_status(tmp_path, 0, "what follows from it", None, "this start")
    write_status(tmp_path, "running", step=9)  # of a checkpoint that was being written meanwhile
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["outcome"], status["rank"], status["message"]) == ("failed", 3, "the reason")
    assert has_failed(tmp_path, "this start")
    assert not has_failed(tmp_path, "another start")
    begin_status(tmp_path)
    assert not has_failed(tmp_path, "this start")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["status.json"]


GLOO = (
    "[/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:434: Connection reset by peer. This is typically caused "
    "by a remote worker hanging or bugs in the application."
)


def test_a_lost_connection_is_told_from_other_errors():
    assert lost_connection(RuntimeError(GLOO)) == "Read error [10.0.0.2]:434: Connection reset by peer"
    nccl = "NCCL error in: x.cpp:1, remote process exited or there was a network error\nncclRemoteError: A call failed"
    assert lost_connection(RuntimeError(nccl)).startswith("NCCL error in: x.cpp:1, remote process exited")
    assert lost_connection(RuntimeError("shapes differ")) is None
    assert lost_connection(OSError("Connection reset by peer")) is None


@pytest.mark.parametrize("known", [False, True])
def test_a_host_that_is_gone_is_named_unless_one_of_its_ranks_says_why(tmp_path, monkeypatch, capsys, known):
    monkeypatch.setattr("megacode.train.main.WORD_SECONDS", 0.2)
    run = Run.__new__(Run)
    run.folder, run.place, run.journal, run.start = tmp_path, Place(0, 0, 4, 2), None, "x"
    run._telling, run.trainer = threading.Lock(), None
    run.peers = [Peer(rank, "ab"[rank // 2], rank, 0) for rank in range(4)]
    if known:
        fail_status(tmp_path, 3, "rank 3 ended", None, "x")
    run._tell_lost(run._elsewhere(), lost_connection(RuntimeError(GLOO)))
    status = json.loads((tmp_path / "status.json").read_text())
    if known:
        assert (status["rank"], status["message"]) == (3, "rank 3 ended")
        assert capsys.readouterr().err == "rank 0 ends, since another rank failed\n"
    else:
        reason = "Read error [10.0.0.2]:434: Connection reset by peer"
        message = f"host b (ranks 2-3) is gone, or the network to it ({reason})"
        assert (status["rank"], status["message"]) == (2, message)
        assert capsys.readouterr().err == f"rank 0 failed: {message}\n"


def test_a_rank_that_is_not_to_tell_ends_after_it_was_told(tmp_path, monkeypatch):
    """Else a slow teller would find it gone too, and could not say who was first."""
    run = Run.__new__(Run)
    run.folder, run.start, left = tmp_path, "x", []
    run.stall = SimpleNamespace(leave_if_told=lambda wait_seconds: None, clear=lambda: None)
    monkeypatch.setattr(os, "_exit", lambda code: left.append(has_failed(tmp_path, "x")))
    thread = threading.Thread(target=run._peers_are_gone, args=([Peer(1, "a", 1, 0)], False))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    fail_status(tmp_path, 1, "rank 1 ended", None, "x")
    thread.join(10)
    assert left == [True]


@pytest.mark.parametrize(("outcome", "code"), [("finished", 0), ("stopped", 75), ("running", 76)])
def test_a_run_that_has_ended_can_no_more_stall(tmp_path, outcome, code):
    assert read_outcome(tmp_path) is None
    write_status(tmp_path, outcome)
    assert read_outcome(tmp_path) == outcome
    run = Run.__new__(Run)
    run.folder, run.place, run.start, run.begun = tmp_path, Place(0, 0, 1, 1), "this start", True
    run.trainer = None
    assert run._claim_stall(Verdict([0], "stalled", "")) == code
    assert has_failed(tmp_path, "this start") is (code == 76)
    assert run._claim_stall(Verdict([0], "stalled again", "")) == (1 if code == 76 else code)


@pytest.mark.parametrize("outcome", ["finished", "failed"])
def test_how_an_earlier_start_ended_does_not_count(tmp_path, outcome):
    write_status(tmp_path, outcome)
    (tmp_path / ".failed").write_text("an earlier start")
    run = Run.__new__(Run)
    run.folder, run.place, run.start, run.begun = tmp_path, Place(0, 0, 1, 1), "this start", False
    run.trainer = None
    assert run._claim_stall(Verdict([0], "stalled", "")) == 76
    assert has_failed(tmp_path, "this start")


def test_a_failure_is_told_on_stderr_where_the_disk_is_full(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megacode.train.metrics.write_status", full)
    run = Run.__new__(Run)
    run.folder, run.place, run.journal, run.start = tmp_path, Place(2, 2, 4, 4), None, "x"
    run._telling, run.trainer = threading.Lock(), None
    run._tell("the reason", None)
    assert capsys.readouterr().err == (
        "rank 2 failed: the reason (and status.json can't be written: No space left on device)\n"
    )
