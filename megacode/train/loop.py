"""The training loop: what a rank does from its recipe to the last checkpoint."""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megacode.checkpoint import store
from megacode.checkpoint.store import CheckpointReader, Progress, Writer
from megacode.data.shards import Shards
from megacode.data.stream import MicroBatch as HostBatch
from megacode.data.stream import TrainStream, ValidationStream, step_indices
from megacode.engine.zero import ZeroEngine
from megacode.errors import UserError
from megacode.model.layers import IGNORE, initial_values, part_of
from megacode.parallel.mesh import Mesh
from megacode.parallel.pipeline import MicroBatch
from megacode.plan.layout import Layout
from megacode.recipe import Recipe
from megacode.train.metrics import Metrics, memory_bytes, write_status
from megacode.train.schedule import learning_rate


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
    metrics: Metrics | None

    def run(self) -> None:
        """Train from `progress` to the last step of the schedule."""
        schedule, checkpoint, logging = self.recipe.schedule, self.recipe.checkpoint, self.recipe.logging
        while self.progress.step < schedule.steps:
            self.step()
            step = self.progress.step
            last = step == schedule.steps
            if self.validation is not None and (last or step % logging.validate_every_steps == 0):
                self.validate()
            if last or step % checkpoint.every_steps == 0:
                self.save()

    def finish(self) -> None:
        """Say that the run is finished, with every rank's peak memory. Waits for all ranks."""
        memory = writer(self.mesh).gather(memory_bytes(self.device))
        if memory is not None:
            write_status(Path(self.recipe.run), "finished", step=self.progress.step, memory_bytes=memory)

    def step(self) -> None:
        """One optimizer step."""
        started = time.monotonic()
        recipe, first = self.recipe, self.progress.next_sample
        batches, (num_valid, num_infilled) = self._batches(self.stream.micro_batch, first, recipe.batch.global_samples)
        loss = self.engine.train_step(batches, self.mesh.zero_size / num_valid.clamp(min=1))
        rate = learning_rate(recipe, self.progress.step)
        norm = self.engine.update(rate)
        mean = self._mean(loss, num_valid)
        if not (math.isfinite(norm) and math.isfinite(mean)):
            raise FloatingPointError(
                f"step {self.progress.step + 1}: loss {mean}, gradient norm {norm}; its update was not applied. "
                f"Start again, from the last checkpoint if there is one, with a lower optimizer.learning_rate"
            )
        self.progress = dataclasses.replace(
            self.progress,
            step=self.progress.step + 1,
            next_sample=first + recipe.batch.global_samples,
            adam_step=self.engine.optimizer_step,
        )
        if self.metrics is not None:
            tokens = recipe.batch.global_samples * recipe.batch.sequence_length
            self.metrics.log(
                {
                    "step": self.progress.step,
                    "tokens": self.progress.next_sample * recipe.batch.sequence_length,
                    "loss": mean,
                    "infilled_share": float(num_infilled / num_valid),
                    "grad_norm": norm,
                    "learning_rate": rate,
                    "tokens_per_second": tokens / (time.monotonic() - started),
                    "memory_bytes": memory_bytes(self.device),
                }
            )

    def validate(self) -> None:
        """Mean loss over the validation set, or as much of it as the recipe says, in batches of a step's size."""
        assert self.validation is not None
        size = self.recipe.batch.global_samples
        wanted = self.recipe.logging.validation_samples or self.validation.num_samples
        loss_sum = torch.zeros((), device=self.device)
        num_valid = torch.zeros((), dtype=torch.int64, device=self.device)
        for first in range(0, min(wanted, self.validation.num_samples), size):
            batches, (valid, _) = self._batches(self.validation.micro_batch, first, size)
            loss_sum += self.engine.evaluate(batches)
            num_valid += valid
        mean = self._mean(loss_sum, num_valid)
        if self.metrics is not None:
            self.metrics.log({"step": self.progress.step, "validation_loss": mean, "validation_tokens": int(num_valid)})

    def save(self) -> None:
        """Write a checkpoint of this step."""
        run = Path(self.recipe.run)
        parts = {name: part_of(parameter) for name, parameter in self.engine.parameters.items()}
        folder = store.step_folder(run, self.progress.step)
        store.save(folder, self.recipe, self.progress, parts, self.engine.read, writer(self.mesh))
        if self.mesh.rank == 0:
            write_status(run, "running", step=self.progress.step, checkpoint=str(folder))
            print(f"step {self.progress.step}: checkpoint in {folder}", flush=True)

    def _batches(
        self, read: Callable[[list[int]], HostBatch], first: int, count: int
    ) -> tuple[list[MicroBatch], torch.Tensor]:
        """This data rank's micro-batches of samples first..first+count-1; how many labels of all data ranks are valid,
        and how many of these belong to infilling documents.
        """
        mesh, micro = self.mesh, self.recipe.batch.micro_samples
        indices = step_indices(first, count, micro, mesh.zero_size, mesh.zero_rank)
        host = [read(numbers) for numbers in indices]
        valid = [batch.labels != IGNORE for batch in host]
        infilled = [batch.infilled & mask for batch, mask in zip(host, valid, strict=True)]
        counts = torch.tensor([sum(map(np.count_nonzero, valid)), sum(map(np.count_nonzero, infilled))])
        counts = counts.to(self.device)
        dist.all_reduce(counts, group=mesh.data_group)
        return [_to_device(batch, self.device) for batch in host], counts

    def _mean(self, loss_sum: torch.Tensor, num_valid: torch.Tensor) -> float:
        """Loss per valid token over the data ranks, on every rank; all tensor ranks of the last stage hold the same."""
        dist.all_reduce(loss_sum)
        return float(loss_sum / self.mesh.tensor / num_valid)


def start(
    recipe: Recipe, layout: Layout, mesh: Mesh, device: torch.device, stream: TrainStream,
    validation: ValidationStream | None,
) -> Trainer:  # fmt: skip
    """A trainer at the newest checkpoint of the run folder, or at the beginning."""
    engine = ZeroEngine(recipe, layout, mesh, device)
    run = Path(recipe.run)
    # Rank 0 decides: on network file systems the ranks may see different newest folders.
    newest = writer(mesh).broadcast(store.newest(run))
    if newest is not None:
        progress = resume(engine, CheckpointReader(newest), mesh)
    else:
        progress = Progress(0, 0, 0, recipe.seed, recipe.batch.sequence_length, stream.windows.num_tokens)
        _initialise(engine, recipe, mesh)
    metrics = Metrics(run, progress.step, recipe.schedule.steps) if mesh.rank == 0 else None
    if mesh.rank == 0:
        write_status(run, "running", step=progress.step)
        print(f"{'resuming from ' + str(newest) if newest else 'starting'} at step {progress.step}", flush=True)
        if progress.step >= recipe.schedule.steps:
            print(f"nothing to do: schedule.steps is {recipe.schedule.steps}; raise it to go on", flush=True)
        else:
            recipe.save(run / "recipe.yaml")
    return Trainer(recipe, layout, mesh, device, engine, stream, validation, progress, metrics)


def check_run_folder(recipe: Recipe, num_tokens: int) -> None:
    """Refuse to go on with a run whose checkpoints are of another model, tokenizer, seed or corpus of other length.

    Raises:
        UserError: names the key that differs.
    """
    newest = store.newest(Path(recipe.run))
    checkpoint = newest or recipe.checkpoint.start_from
    if checkpoint is None:
        return
    reader = CheckpointReader(Path(checkpoint))
    for key in type(reader.model).model_fields:
        here, there = getattr(recipe.model, key), getattr(reader.model, key)
        if here != there and key not in ("preset", "init_std", "max_positions"):
            raise UserError(
                f"model.{key} is {here} and {checkpoint} has {there}; change it, or name another `run` folder"
            )
    if Path(recipe.tokenizer.path).read_bytes() != reader.tokenizer_path.read_bytes():
        raise UserError(
            f"tokenizer.path differs from the tokenizer of {checkpoint}; name that one, or another `run` folder"
        )
    if newest is None:
        return
    progress = reader.progress
    for key, here, there in (
        ("seed", recipe.seed, progress.seed),
        ("batch.sequence_length", recipe.batch.sequence_length, progress.sequence_length),
        ("the number of tokens of data.train", num_tokens, progress.num_tokens),
    ):
        if here != there:
            raise UserError(
                f"{key} is {here} and {newest} has {there}, by which it counts its samples; change it back, or name "
                f"another `run` folder (checkpoint.start_from takes the weights along)"
            )


def resume(engine: ZeroEngine, reader: CheckpointReader, mesh: Mesh) -> Progress:
    """Load weights, Adam's state and progress from a checkpoint of any layout, after checking its files.

    Raises:
        UserError: a file is missing or damaged.
    """
    _verify(reader, mesh)
    engine.set_optimizer_step(reader.progress.adam_step)
    for name, parameter in engine.parameters.items():
        for key in ("weight", *store.STATES):
            engine.write(name, reader.read_part(name, part_of(parameter), key), key)
    return reader.progress


def _verify(reader: CheckpointReader, mesh: Mesh) -> None:
    """Check every file once, shared by the ranks; what one finds is raised on all."""
    problem = None
    try:
        reader.verify(mesh.rank, dist.get_world_size())
    except UserError as error:
        problem = str(error)
    ranks = writer(mesh)
    problems = ranks.gather(problem)
    problem = ranks.broadcast(problems and next(filter(None, problems), None))
    if problem is not None:
        raise UserError(problem)


def _initialise(engine: ZeroEngine, recipe: Recipe, mesh: Mesh) -> None:
    """Weights of the checkpoint that the recipe starts from, or random ones: the same in every layout."""
    source = recipe.checkpoint.start_from
    reader = CheckpointReader(Path(source)) if source else None
    if reader is not None:
        _verify(reader, mesh)
    for name, parameter in engine.parameters.items():
        part = part_of(parameter)
        whole = reader.read_part(name, part) if reader else part.take(initial_values(name, part, recipe.seed))
        engine.write(name, whole)


def _to_device(batch: HostBatch, device: torch.device) -> MicroBatch:
    def move(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    cu_seqlens = None if batch.cu_seqlens is None else move(batch.cu_seqlens)
    return MicroBatch(move(batch.tokens), move(batch.labels), move(batch.positions), cu_seqlens)


def writer(mesh: Mesh) -> Writer:
    """This rank, as `store.save` asks for it."""
    group = mesh.control_group

    def gather(value: Any) -> list[Any] | None:
        collected: list[Any] | None = [None] * dist.get_world_size() if mesh.rank == 0 else None
        dist.gather_object(value, collected, group=group)
        return collected

    def broadcast(value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, group=group)
        return box[0]

    return Writer(mesh.rank, mesh.zero_rank, mesh.zero_size, mesh.tensor_rank, gather, broadcast)


def open_streams(recipe: Recipe, tokenizer: Any) -> tuple[TrainStream, ValidationStream | None]:
    """The recipe's training and validation streams.

    Raises:
        UserError: shards are missing, damaged, too short or of another tokenizer.
    """
    data, length = recipe.data, recipe.batch.sequence_length
    stream = TrainStream(
        Shards(data.train), tokenizer, sequence_length=length, seed=recipe.seed, infilling_rate=data.infilling_rate,
        suffix_first_rate=data.suffix_first_rate, document_masks=data.document_masks,
    )  # fmt: skip
    if data.valid is None:
        return stream, None
    return stream, ValidationStream(Shards(data.valid), sequence_length=length, document_masks=data.document_masks)
