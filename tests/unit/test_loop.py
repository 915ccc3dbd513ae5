"""The order of what is due between steps, without an engine."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megacode.errors import UserError
from megacode.train import loop
from megacode.train.faults import Asked
from megacode.train.loop import Trainer


class Saver:
    """Notes what is asked of it."""

    def __init__(self, log):
        self.log, self.busy = log, False

    def noted(self):
        return torch.ones(2)

    def agree(self, totals, step):
        self.log.append(f"agree at {step}")
        self.busy = False

    def wait(self, step):
        if self.busy:
            self.log.append(f"stands at {step}")
            self.busy = False

    def close(self):
        self.log.append("close")


def trainer(steps, asked, every_steps=100):
    """A trainer whose steps, saves and validations are lines of `log`; `asked` is what the ranks agree on, by step."""
    it, log = object.__new__(Trainer), []
    logging = SimpleNamespace(profile_steps=[], profile_ranks=[], validate_every_steps=2)
    checkpoint = SimpleNamespace(every_steps=every_steps)
    it.recipe = SimpleNamespace(schedule=SimpleNamespace(steps=steps), checkpoint=checkpoint, logging=logging)
    it.mesh, it.validation = SimpleNamespace(rank=0), object()
    it.progress, it.requests = SimpleNamespace(step=0), SimpleNamespace(take=lambda asked: None)
    saver = it.__dict__["saver"] = Saver(log)
    it.__dict__["loader"] = mock.MagicMock()

    def step():
        it.progress = SimpleNamespace(step=it.progress.step + 1)
        return asked.get(it.progress.step, Asked(None, False))

    def save():
        log.append(f"copied at {it.progress.step}")
        saver.busy = True

    it.step, it.save = step, save
    it.validate = lambda: log.append(f"validated at {it.progress.step}")
    return it, log


def test_the_last_checkpoint_stands_before_a_validation():
    it, log = trainer(4, {})
    it.run()
    assert log == ["validated at 2", "copied at 4", "stands at 4", "validated at 4", "close"]


def test_the_checkpoint_of_a_stop_stands_before_a_validation():
    it, log = trainer(10, {2: Asked("SIGUSR1", False)})
    assert it.run() == "SIGUSR1"
    assert log == ["copied at 2", "stands at 2", "validated at 2", "close"]


def test_a_checkpoint_gets_its_name_within_a_validation(monkeypatch):
    it, log = trainer(10, {})
    it.save()
    it.recipe.batch, it.recipe.logging.validation_samples = SimpleNamespace(global_samples=4), None
    it.validation, it.stream = SimpleNamespace(num_samples=12), SimpleNamespace(sources=("code",))
    it.mesh, it.device, it.journal = None, torch.device("cpu"), None
    it._batches = lambda loader: log.append("a batch") or ([], torch.ones(4, dtype=torch.int64))
    it.engine = SimpleNamespace(evaluate=lambda batches: torch.ones(2))
    monkeypatch.setattr(loop, "load", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: None)
    Trainer.validate(it)
    assert log == ["copied at 0", "a batch", "agree at 0", "a batch", "a batch"]


def test_a_checkpoint_that_fails_does_not_hide_why_the_run_ends():
    it, _ = trainer(10, {})

    def diverge():
        raise FloatingPointError("step 1: loss nan")

    def fail(step):
        raise UserError("the checkpoint C could not be written")

    it.step, it.saver.wait = diverge, fail
    with pytest.raises(UserError, match="step 1: loss nan; and the checkpoint C could not be written"):
        it.run()
