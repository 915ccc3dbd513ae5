"""Requests, the watch over other ranks, and what is skipped: the parts that need no training."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from megacode.train.faults import FILES, SIGNALS, PeerWatch, Requests, this_process


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
    assert requests.signalled


def test_files_ask_and_go_when_it_is_done(tmp_path):
    requests = Requests(tmp_path, looks=True)
    assert asked(requests) == asked(Requests(tmp_path, looks=False))
    for name in FILES:
        (tmp_path / name).touch()
    requests = Requests(tmp_path, looks=True)
    both = asked(requests)
    assert both.stop == f"the file {tmp_path}/STOP"
    assert both.save
    requests.done(both)
    assert not list(tmp_path.iterdir())
    assert asked(requests).stop is None


def test_a_file_may_name_the_step(tmp_path):
    (tmp_path / "STOP").write_text("7\n")
    requests = Requests(tmp_path, looks=True)
    assert [asked(requests, step).stop is not None for step in (5, 6, 7, 8)] == [False, False, True, True]


def test_only_one_rank_looks_for_files(tmp_path):
    (tmp_path / "SAVE").touch()
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
