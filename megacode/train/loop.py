"""The training loop: what a rank does from its first step to the last checkpoint."""

import dataclasses
import functools
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacode.checkpoint.keep import newest
from megacode.checkpoint.reader import Progress
from megacode.data.stream import TrainStream, ValidationStream
from megacode.engine.zero import ZeroEngine
from megacode.errors import UserError
from megacode.model.layers import part_of
from megacode.parallel import heartbeat
from megacode.parallel.heartbeat import awaiting_device, communicating, doing
from megacode.parallel.mesh import Mesh
from megacode.parallel.phases import Recorder, measure
from megacode.parallel.pipeline import MicroBatch, to_device
from megacode.plan.layout import Layout
from megacode.plan.model import flops_per_token
from megacode.recipe import Recipe
from megacode.train.faults import Asked, Requests
from megacode.train.journal import Journal
from megacode.train.loader import OUTCOMES, Loader, count_documents, count_labels, load
from megacode.train.metrics import (
    count_figures,
    device_peak_teraflops,
    memory_bytes,
    split_losses,
    validation_figures,
    write_status,
)
from megacode.train.profile import profiled
from megacode.train.saver import NUM_FLAGS, Saver
from megacode.train.schedule import learning_rate
from megacode.train.start import writer


@dataclass
class Trainer:
    """What a rank holds during a run."""

    recipe: Recipe
    layout: Layout
    mesh: Mesh
    device: torch.device
    engine: ZeroEngine
    stream: TrainStream
    validation: ValidationStream | None
    progress: Progress
    requests: Requests
    journal: Journal | None
    """On rank 0 only."""
    recorder: Recorder | None = None
    """Of the phases of a step, where the recipe asks for them."""
    skips_in_a_row: int = field(default=0, init=False)

    def run(self) -> str | None:
        """Train from `progress` to the schedule's last step; returns who asked to stop before it, or None.

        Raises:
            FloatingPointError: a loss or a gradient norm is not finite, and the recipe does not go on then.
        """
        schedule = self.recipe.schedule
        asked = Asked(None, False)
        if self.progress.step < schedule.steps:
            doing("starting the data loader")
            with self.loader:
                try:
                    asked = self._steps()
                except FloatingPointError as error:  # on every rank: the last checkpoint is still worth having
                    try:
                        self.saver.wait(self.progress.step)
                    except UserError as unwritten:
                        raise UserError(f"{error}; and {unwritten}") from None
                    raise
        return asked.stop if self.progress.step < schedule.steps else None

    @functools.cached_property
    def loader(self) -> Loader:
        """Of the steps from `progress` to the schedule's last one."""
        left = self.recipe.schedule.steps - self.progress.step
        first, size = self.progress.next_sample, self.recipe.batch.global_samples
        return load(self.recipe, self.mesh, self.stream, first, first + left * size, self.recipe.data.workers)

    @functools.cached_property
    def saver(self) -> Saver:
        """Writes this run's checkpoints."""
        parts = {name: part_of(parameter) for name, parameter in self.engine.parameters.items()}
        return Saver(
            self.recipe, parts, self.engine, writer(self.mesh), self.journal, self.requests.done,
            pinned=self.device.type == "cuda",
        )  # fmt: skip

    def _steps(self) -> Asked:
        """All steps that are left, with what is due between them; what the ranks agreed on at the last one's end."""
        schedule, checkpoint, logging = self.recipe.schedule, self.recipe.checkpoint, self.recipe.logging
        asked = Asked(None, False)
        while self.progress.step < schedule.steps and asked.stop is None:
            recipe_asks = self.progress.step + 1 in logging.profile_steps and self.mesh.rank in logging.profile_ranks
            with profiled(self.recipe, self.mesh.rank, self.progress.step + 1) if recipe_asks else nullcontext():
                asked = self.step()
            step = self.progress.step
            last = step == schedule.steps
            if last or asked.stop is not None or asked.save or step % checkpoint.every_steps == 0:
                self.save()
                self.requests.take(asked)
            if last or asked.stop is not None:  # who asked may wait for less time than a validation takes
                self.saver.wait(step)
            if self.validation is not None and (last or step % logging.validate_every_steps == 0):
                self.validate()
        self.saver.close()
        return asked

    def finish(self, stopped: str | None) -> None:
        """Say that the run is finished or was asked to stop, with every rank's peak memory. Waits for all ranks."""
        doing("finishing", patient=True)
        memory = writer(self.mesh).gather(memory_bytes(self.device))
        if self.journal is not None:
            run, step = Path(self.recipe.run), self.progress.step
            last = newest(run)
            facts = {"step": step, "checkpoint": last and str(last), "memory_bytes": memory}
            if stopped is None:
                write_status(run, "finished", **facts)
            else:
                text = f"stopped at step {step}: asked by {stopped}; start again to go on"
                self.journal.event("stop", step, text, asked_by=stopped)
                write_status(run, "stopped", message=f"asked by {stopped}", **facts)
            self.journal.close()
            self.journal.check()

    def step(self) -> Asked:
        """One optimizer step; what the ranks have agreed on at its end."""
        started = time.monotonic()
        if self.recorder is not None:
            self.recorder.restart()
        recipe, first, groups = self.recipe, self.progress.next_sample, 2 * len(self.stream.sources)
        heartbeat.begin_step(self.progress.step + 1)
        doing("reading data")
        with measure("data"):
            batches, counts = self._batches(self.loader)
        num_valid = counts[:groups].sum().clamp(min=1)
        sums = self.engine.train_step(batches, self.mesh.zero_size / num_valid)
        noted = torch.cat([self.requests.noted(self.progress.step + 1), self.saver.noted()])
        totals = torch.cat([sums / self.mesh.tensor, to_device(noted, self.device)])
        with communicating("all-reduce", "world"):
            dist.all_reduce(totals)
        doing("optimizer")
        rate = learning_rate(recipe, self.progress.step)
        with measure("optimizer"):
            norm, skipped = self.engine.update(rate, totals[:groups].sum() / num_valid)
            # The step's one wait for the device.
            with awaiting_device():
                values = torch.cat([part.double().flatten() for part in (totals, counts, norm, skipped)]).tolist()
        loss_sums, flags = values[:groups], values[groups : len(totals)]
        values, (norm_value, skip) = values[len(totals) : -2], values[-2:]
        label_counts, documents = values[:groups], values[groups:]
        self.progress = dataclasses.replace(
            self.progress,
            step=self.progress.step + 1,
            next_sample=first + recipe.batch.global_samples,
            adam_step=self.progress.adam_step + (0 if skip else 1),
            ledger=_add_labels(self.progress.ledger, self.stream.sources, label_counts),
        )
        self.saver.agree(flags[-NUM_FLAGS:], self.progress.step)
        doing("logging")
        with measure("logging"):
            losses = split_losses(loss_sums, label_counts, self.stream.sources)
            losses |= count_figures(dict(zip(OUTCOMES, map(int, documents), strict=True)))
            figures = {**losses, "grad_norm": norm_value, "learning_rate": rate, "skipped": bool(skip)}
            self._log(figures, time.monotonic() - started)
        self._judge(figures, first)
        return self.requests.agree(flags[:-NUM_FLAGS])

    def _log(self, figures: dict[str, Any], seconds: float) -> None:
        phases = self.recorder.take() if self.recorder else None
        if phases is not None:
            heartbeat.add_phases(phases)
        if self.journal is None:
            return
        recipe, length = self.recipe, self.recipe.batch.sequence_length
        rate = recipe.batch.global_samples * length / seconds
        peak = device_peak_teraflops(recipe, self.device)
        line = {
            "step": self.progress.step,
            "tokens": self.progress.next_sample * length,
            **figures,
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "mfu": peak and flops_per_token(recipe.model, length) * rate / (self.layout.world_size * peak * 1e12),
            "memory_bytes": memory_bytes(self.device),
        }
        self.journal.metrics(line if phases is None else {**line, "phases": phases})

    def _judge(self, figures: dict[str, Any], first: int) -> None:
        """What the recipe says of a step whose update was left out since its loss or its norm is not finite."""
        if not figures["skipped"]:
            self.skips_in_a_row = 0
            return
        self.skips_in_a_row += 1
        faults, step, count = self.recipe.faults, self.progress.step, self.recipe.batch.global_samples
        text = (
            f"step {step}: loss {figures['loss']}, gradient norm {figures['grad_norm']}; its update was not applied "
            f"(samples {first} to {first + count - 1})"
        )
        if self.journal is not None:
            self.journal.event(
                "skip", step, text, first_sample=first, num_samples=count, loss=str(figures["loss"]),
                grad_norm=str(figures["grad_norm"]), policy=faults.non_finite,
            )  # fmt: skip
        mend = (
            "start again, from the last checkpoint if there is one, with a lower optimizer.learning_rate, or let "
            "faults.non_finite: skip leave such steps out"
        )
        if faults.non_finite == "stop":
            raise FloatingPointError(f"{text}; {mend}")
        if self.skips_in_a_row >= faults.skips_in_a_row:
            raise FloatingPointError(f"{text}, and so {self.skips_in_a_row} in a row (faults.skips_in_a_row); {mend}")

    def validate(self) -> None:
        """Mean loss over the validation set, or as much of it as the recipe says, in batches of a step's size."""
        assert self.validation is not None
        size = self.recipe.batch.global_samples
        wanted = self.recipe.logging.validation_samples or self.validation.num_samples
        sums = torch.zeros(2 * len(self.stream.sources), device=self.device)
        counts = torch.zeros(2 * len(self.stream.sources), dtype=torch.int64, device=self.device)
        samples = min(wanted, self.validation.num_samples)
        loader = load(self.recipe, self.mesh, self.validation, 0, samples, workers=0)
        for _ in range(0, samples, size):
            doing("reading validation data")
            batches, batch_counts = self._batches(loader)
            sums += self.engine.evaluate(batches)
            counts += batch_counts[: len(counts)]
            if self.saver.busy:  # a validation may be long, and what is written must not wait for its name
                self._agree_on_checkpoint()
        with communicating("all-reduce", "world"):
            dist.all_reduce(sums)
        if self.journal is not None:
            with awaiting_device():
                num_valid, total = int(counts.sum()), float(sums.sum())
            figures = validation_figures(total / self.mesh.tensor, num_valid)
            self.journal.metrics({"step": self.progress.step, **figures})

    def _agree_on_checkpoint(self) -> None:
        noted = to_device(self.saver.noted(), self.device)
        with communicating("all-reduce", "world"):
            dist.all_reduce(noted)
        with awaiting_device():
            totals = noted.tolist()
        self.saver.agree(totals, self.progress.step)

    def save(self) -> None:
        """Take a checkpoint of this step; it is written while the run goes on.

        Raises:
            UserError: it, or the one before, can't be written.
        """
        samples = self.stream.mixture.counts(self.progress.next_sample)
        ledger = {
            name: {"samples": count, **self.progress.ledger.get(name, {})}
            for name, count in zip(self.stream.sources, samples, strict=True)
        }
        self.saver.save(dataclasses.replace(self.progress, ledger=ledger))

    def _batches(self, loader: Loader) -> tuple[list[MicroBatch], torch.Tensor]:
        """This rank's micro-batches of the loader's next step, and counts of the whole step [groups + OUTCOMES]: labels
        that count, by group (2 * source + whether the label belongs to an infilling document), and documents.
        """
        host = loader.step()
        labels = count_labels(host, self.mesh, 2 * len(self.stream.sources))
        totals = to_device(torch.cat([labels, count_documents(loader.documents, self.mesh)]), self.device)
        batches = [batch.to(self.device) for batch in host]  # first: a copy may wait for what is enqueued
        with communicating("all-reduce", "world"):
            dist.all_reduce(totals)
        return batches, totals


def _add_labels(
    ledger: dict[str, dict[str, int]], sources: tuple[str, ...], counts: list[float]
) -> dict[str, dict[str, int]]:
    """A ledger after a step in which so many labels of group 2 * source + infilled counted."""
    added = {}
    for number, name in enumerate(sources):
        before, (plain, infilled) = ledger.get(name, {}), counts[2 * number : 2 * number + 2]
        added[name] = {
            "labels": before.get("labels", 0) + int(plain + infilled),
            "infilled_labels": before.get("infilled_labels", 0) + int(infilled),
        }
    return added
