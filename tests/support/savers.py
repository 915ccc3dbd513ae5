"""Two ranks with a `Saver` each, and writers that a test holds up or breaks."""

import threading
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from megacode.checkpoint.keep import finished
from megacode.checkpoint.reader import Progress
from megacode.checkpoint.store import Writer
from megacode.checkpoint.tensorfile import TensorFile
from megacode.errors import UserError
from megacode.train.saver import Saver
from support.saving import PARTS, Held, config


class Book:
    """A journal that keeps events."""

    def __init__(self):
        self.events = []

    def event(self, event, step, text, **values):
        self.events.append((event, step, {"text": text, **values}))


class Setting:
    """A rank's saver; what it saves at a step is full of the step's number."""

    def __init__(self, run):
        self.rank, self.step, self.obeyed = dist.get_rank(), 0, 0
        self.book = Book() if self.rank == 0 else None
        (run / "recipe.yaml").touch()
        ranks = Writer(self.rank, self.rank, 0, self._gather, self._broadcast)
        recipe = config(run, every_steps=1)
        holder = Held(PARTS, lambda into, *_: into.fill_(float(self.step)), dist.get_world_size())
        self.saver = Saver(recipe, PARTS, holder, ranks, self.book, self._obey, False)

    def _obey(self):
        self.obeyed += 1

    @staticmethod
    def _gather(value):
        collected = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(value, collected)
        return collected

    @staticmethod
    def _broadcast(value):
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def train(self, save=False):
        """A step, and a checkpoint after it where asked for."""
        self.step += 1
        noted = self.saver.noted()
        dist.all_reduce(noted)
        self.saver.agree(noted.tolist(), self.step)
        if save:
            self.saver.save(Progress(self.step, 8 * self.step, self.step, 7, 16, 0))


def go_on(run: Path):
    """Steps while rank 1's writer is held up. Returns which stood when, and rank 0's events."""
    write, go = TensorFile.write, threading.Event()

    def held(self, name, tensor):
        if dist.get_rank() == 1:
            assert go.wait(30)
        write(self, name, tensor)

    with mock.patch.object(TensorFile, "write", held):
        setting = Setting(run)
        setting.train(save=True)
        for _ in range(4):
            setting.train()
        while_held = [folder.name for folder in finished(run)]
        go.set()
        while not setting.obeyed:
            setting.train()
        dist.barrier()
        stood = [folder.name for folder in finished(run)]
        for _ in range(2):  # each comes while the one before is written
            go.clear()
            setting.train(save=True)
            threading.Timer(0.2, go.set).start()
        setting.train(save=True)
        go.set()
        setting.saver.wait(setting.step)
        setting.saver.close()
    return while_held, stood, setting.step, setting.book and setting.book.events


def fail(run: Path, rank: int):
    """A rank's disk is full at its second checkpoint. Returns what each rank raises, and when."""
    write, full = TensorFile.write, [False]

    def failing(self, name, tensor):
        if full[0] and dist.get_rank() == rank:
            raise OSError(28, "No space left on device")
        write(self, name, tensor)

    with mock.patch.object(TensorFile, "write", failing):
        setting = Setting(run)
        setting.train(save=True)
        setting.saver.wait(1)
        full[0] = True
        setting.train(save=True)
        try:
            while setting.step < 10_000:
                setting.train()
        except UserError as error:
            return str(error), setting.step
    raise AssertionError("nothing is raised")
