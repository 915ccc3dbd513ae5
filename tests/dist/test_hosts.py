"""Two hosts, each with a launcher of its own started by hand: `deepspeed --hostfile` and torchrun, one after the other."""

import json
import socket
import time
from collections import Counter

import pytest
from support.hosts import NAMES, deepspeed, end, hosts, separate, torchrun
from support.launching import metrics, status, write_recipe
from support.stalling import run_ranks

from megacode.checkpoint.keep import newest

NUM_STEPS = 16
CHANGES = [f"schedule.steps={NUM_STEPS}", "checkpoint.every_steps=2", "data.valid=null"]
KEYS = ("step", "loss", "grad_norm", "learning_rate", "tokens")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("hosts"))


def figures(run):
    return [{key: line[key] for key in KEYS} for line in metrics(run) if "loss" in line]


def logs(folder):
    return {name: (folder / f"{name}.log").read_text() for name in NAMES}


def train(launcher, recipe):
    """A whole run of two pipeline stages, one a host."""
    folder = recipe.parent / launcher.__name__
    folder.mkdir()
    run = folder / "run"
    with hosts(launcher, folder, [str(recipe), f"run={run}", *CHANGES]) as both:
        codes = [host.wait(timeout=120) for host in both]
    assert codes == [0, 0], logs(folder)
    assert status(run)["outcome"] == "finished"
    (start,) = (json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines())
    assert start["hosts"] == (dict.fromkeys(NAMES, 1) if separate() else {socket.gethostname(): 2})
    return figures(run)


@pytest.fixture(scope="module")
def by_deepspeed(recipe):
    return train(deepspeed, recipe)


def test_both_launchers_train_the_same(recipe, by_deepspeed):
    assert [line["step"] for line in by_deepspeed] == list(range(1, NUM_STEPS + 1))
    assert train(torchrun, recipe) == by_deepspeed


def test_a_host_that_is_gone_ends_the_run_which_goes_on_elsewhere(recipe, by_deepspeed):
    folder = recipe.parent / "gone"
    folder.mkdir()
    run = folder / "run"
    with hosts(deepspeed, folder, [str(recipe), f"run={run}", *CHANGES]) as (alpha, beta):
        began = time.monotonic()
        while newest(run) is None and time.monotonic() < began + 120:
            assert alpha.poll() is beta.poll() is None, logs(folder)
            time.sleep(0.01)
        end(beta)
        assert alpha.wait(timeout=60) == 1, logs(folder)  # long before a stall or the collectives' timeout
    told = status(run)
    assert (told["outcome"], told["rank"]) == ("failed", 1)
    assert told["message"].startswith("host beta (rank 1) is gone, or the network to it (" if separate() else "rank 1 (")
    assert f"rank 0 failed: {told['message']}\n" in logs(folder)["alpha"]

    done = run_ranks(recipe, f"run={run}", *CHANGES, world_size=2)  # both ranks on this machine
    assert done.codes == [0, 0], done.output
    assert f"resuming from {told['checkpoint']} at step" in done.output
    assert figures(run) == by_deepspeed
