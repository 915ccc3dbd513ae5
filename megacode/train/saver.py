"""Checkpoints of a run, written while it goes on.

A step waits until this rank's share is copied to host memory. A thread of each rank writes it, and touches neither
collectives nor the device. That all are done, or one has failed, rides on the step's all-reduce; then rank 0 gets their
reports and gives the checkpoint its name.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megacode.checkpoint import keep, store
from megacode.checkpoint.reader import Progress
from megacode.checkpoint.store import Holder, Report, Share, StoppedError, Writer
from megacode.errors import UserError
from megacode.model.layers import Slice
from megacode.parallel.heartbeat import doing
from megacode.recipe import Recipe
from megacode.train.journal import Journal
from megacode.train.metrics import write_status

NUM_FLAGS = 2
"""Length of `Saver.noted`."""

REMOVING_SECONDS = 60.0
"""How long the end of a run waits for a removal."""


@dataclass
class _Save:
    """A checkpoint that is being written."""

    folder: Path
    progress: Progress
    started: float
    blocked_seconds: float = 0.0
    report: Report | None = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)

    def write(self, share: Share) -> None:
        """What the thread does."""
        try:
            self.report = share.write(self.folder, self.stop.is_set)
        except StoppedError:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()

    @property
    def failed(self) -> bool:
        """Whether this rank could not write."""
        return self.error is not None or (self.report is not None and self.report.problem is not None)


class Saver:
    """Saves the checkpoints of a run, one at a time. Methods are collective, but for `noted`.

    Args:
        recipe: of the run.
        parts: this rank's parameters by global name, in the order in which all ranks of the stage hold them.
        holder: copies tensors to the host.
        ranks: this rank's place.
        journal: on rank 0.
        obeyed: called when a checkpoint stands.
        pinned: whether a GPU copies to the host memory.
    """

    def __init__(
        self, recipe: Recipe, parts: Mapping[str, Slice], holder: Holder, ranks: Writer, journal: Journal | None,
        obeyed: Callable[[], None], pinned: bool,
    ) -> None:  # fmt: skip
        self.recipe, self.run, self.journal = recipe, Path(recipe.run), journal
        self._parts, self._holder, self._ranks, self._obeyed, self._pinned = dict(parts), holder, ranks, obeyed, pinned
        self._share: Share | None = None
        self._save: _Save | None = None
        self._told_of_waiting = False
        self._pruning: threading.Thread | None = None
        self._put_off: int | None = None
        """The step whose surplus is removed with the next one's, since removing took too long."""

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._save is not None

    def noted(self) -> torch.Tensor:
        """[done, failed]: 1 or 0 each, what `agree` wants summed over the ranks; on the host."""
        done = self._save is not None and self._save.done.is_set()
        return torch.tensor([float(done), float(done and self._save is not None and self._save.failed)])

    def agree(self, totals: Sequence[float], step: int) -> None:
        """Finish the checkpoint that is being written if all ranks are done, or one has failed.

        Args:
            totals: sums of `noted` over all ranks.
            step: that has been done meanwhile.

        Raises:
            UserError: a rank could not write; on every rank.
        """
        done, failed = totals
        if self._save is None or not (failed or done == dist.get_world_size()):
            return
        if failed:
            self._save.stop.set()
        self.wait(step)

    def save(self, progress: Progress) -> None:
        """Take a checkpoint of this moment; it stands some steps later, or after `wait`.

        Raises:
            UserError: it, or the one before, can't be written; on every rank.
        """
        step = progress.step
        if self._save is not None:
            self._tell_that_it_waits(step)
            self.wait(step)
        doing("copying a checkpoint", patient=True)
        save = _Save(store.step_folder(self.run, step), progress, time.monotonic())
        store.begin(save.folder, self._ranks, must_hold=self.run / "recipe.yaml")
        if self._share is None:
            self._share = Share(self._parts, self._holder, self._ranks, self._pinned)
        self._share.copy()
        save.blocked_seconds = time.monotonic() - save.started
        self._save = save
        threading.Thread(target=save.write, args=(self._share,), name="checkpoint", daemon=True).start()

    def wait(self, step: int) -> None:
        """Have the checkpoint that is being written stand, if there is one; raises as `agree`.

        Args:
            step: that has been done meanwhile.
        """
        save = self._save
        if save is None:
            return
        started = time.monotonic()
        doing("waiting for a checkpoint to be written", patient=True)
        save.done.wait()
        if save.error is not None:
            raise save.error
        doing("finishing a checkpoint", patient=True)
        trouble = store.finish(save.folder, self.recipe, save.progress, save.report, self._ranks)
        self._save = None
        save.blocked_seconds += time.monotonic() - started
        if self.journal is not None:
            self._tell(save, step)
            if trouble is None:
                self._prune(save.progress.step)
            else:  # older ones are not surplus as long as this one's name may go
                text = f"step {save.progress.step}: {save.folder} stands, and then: {trouble}"
                self.journal.event("checkpoint_trouble", save.progress.step, text, folder=str(save.folder))
        self._obeyed()

    def close(self) -> None:
        """Wait until surplus checkpoints are removed, a minute or two at most; the next start removes the rest."""
        if self._pruning is not None:
            doing("removing old checkpoints", patient=True)
            self._pruning.join(REMOVING_SECONDS)
        if self._put_off is not None:
            self._prune(self._put_off)
            if self._pruning is not None:
                self._pruning.join(REMOVING_SECONDS)

    def _tell_that_it_waits(self, step: int) -> None:
        assert self._save is not None
        before, every = self._save.progress.step, self.recipe.checkpoint.every_steps
        # Of one that was asked for, or the last, no other interval says anything.
        if self._told_of_waiting or self.journal is None or step % every or before % every:
            return
        self._told_of_waiting = True
        text = (
            f"step {step}: waits until the checkpoint of step {before} is written; with a larger "
            f"checkpoint.every_steps it would not"
        )
        self.journal.event("checkpoint_wait", step, text)

    def _tell(self, save: _Save, step: int) -> None:
        assert self.journal is not None
        folder, saved = save.folder, save.progress.step
        write_status(self.run, "running", step=step, checkpoint=str(folder))
        size = sum(file.stat().st_size for file in folder.iterdir())
        self.journal.event(
            "checkpoint", saved, f"step {saved}: checkpoint in {folder}", folder=str(folder),
            seconds=time.monotonic() - save.started, blocked_seconds=save.blocked_seconds, bytes=size,
        )  # fmt: skip

    def _prune(self, step: int) -> None:
        """Remove surplus checkpoints in a thread: that may take as long as writing them."""
        last = self.recipe.checkpoint.keep_last
        if last is None:
            return
        if self._pruning is not None and self._pruning.is_alive():  # training does not wait for a slow disk
            self._put_off = step
            return
        self._put_off = None
        self._pruning = threading.Thread(target=self._remove_surplus, args=(step, last), name="pruning", daemon=True)
        self._pruning.start()

    def _remove_surplus(self, step: int, last: int) -> None:
        """What can't be removed is told and left to the next time: the run is not worth less for it."""
        assert self.journal is not None
        for folder in keep.surplus(self.run, last, self.recipe.checkpoint.keep_every):
            try:
                keep.remove(folder)
            except OSError as error:
                text = f"step {step}: {folder} could not be removed: {error.strerror or error}"
                with suppress(UserError):  # the journal's own trouble is raised in the main thread
                    self.journal.event("prune", step, text, folder=str(folder))
