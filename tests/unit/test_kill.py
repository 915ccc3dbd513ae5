"""kill -9 at any moment of a save leaves the checkpoint before it whole."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from support.saving import assert_whole

from megacode.checkpoint.keep import finished, newest, step_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen(
        [sys.executable, ROOT / "tests/support/saving.py"], env=environment, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip

        def ask(*words):
            process.stdin.write(" ".join(map(str, words)) + "\n")
            return process.stdout.readline().split()

        yield ask
        process.stdin.close()


def marks(run):
    path = run / "marks"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(run, count):
    deadline = time.monotonic() + 60
    while len(marks(run)) < count:
        assert time.monotonic() < deadline, "nothing is saved"
        time.sleep(0.001)


def kill(server, run, generator, ranks, slow, seconds):
    """Let ranks save, kill them within some saves; whether that hit a save."""
    before = len(marks(run))
    pids = [int(pid) for pid in server(run, ranks, int(slow), generator.randrange(100))]
    wait_for(run, before + 1)
    time.sleep(generator.uniform(0, 1.5 * seconds))
    generator.shuffle(pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        time.sleep(generator.choice((0, 0.003)) if ranks == 2 else 0)
    server()
    return marks(run)[-1][0] == "b"


@pytest.fixture
def run():
    """In memory: a save does not wait for a disk, and a kill takes nothing of what was written from either."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize(("ranks", "wanted"), [(1, 24), (2, 6)])
def test_the_checkpoint_before_outlives_a_kill_at_any_moment(server, run, ranks, wanted):
    generator = random.Random(ranks)
    pids = [int(pid) for pid in server(run, ranks, 0, 0)]
    wait_for(run, 2)
    started = time.monotonic()
    wait_for(run, 8)
    seconds = (time.monotonic() - started) / 3
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    server()
    hits = kills = 0
    while hits < wanted and kills < 4 * wanted:
        kills += 1
        hits += kill(server, run, generator, ranks, kills % 2, seconds)
        stands = [int(step) for mark, step in marks(run) if mark == "e"]
        last = newest(run)
        assert step_of(last) >= max(stands), "what stood once is lost"
        for folder in finished(run):  # also one that was to be removed
            assert_whole(folder)
        named = run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()
        assert named in finished(run), "latest names one that does not stand"
        assert step_of(named) >= max(stands), "latest is moved before a save is done"
    assert hits == wanted, f"only {hits} of {kills} kills hit a save"
