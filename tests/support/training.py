"""The same training in any layout and in one plain-torch process, on the same weights and tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megacode.doctor import outcome as doctor
from megacode.model.layers import IGNORE, Slice, initial_values, part_of
from megacode.model.llama import Llama, initialise
from megacode.parallel.pipeline import MicroBatch
from megacode.plan.layout import fit
from megacode.recipe import Recipe

SEED = 7
VALIDATION_STEP = 100


def recipe(**sections: Any) -> Recipe:
    """A nano recipe for tests; sections are merged over it."""
    values: dict[str, Any] = {
        "run": "unused",
        "precision": "fp32",
        "model": {"preset": "nano", "hidden": 32, "ffn": 48, "vocabulary": 61},
        "tokenizer": {"path": "unused"},
        "data": {"train": "unused", "workers": 0},
        "batch": {"global_samples": 8, "micro_samples": 1, "sequence_length": 16},
        "optimizer": {"learning_rate": 1e-2, "clip": 0.5},
        "schedule": {"steps": 3, "warmup_steps": 0},
    }
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return Recipe.model_validate(values)


@dataclass
class Outcome(doctor.Outcome):
    """What a training leaves, and what only tests look at."""

    validation: float | None = None
    """Summed negative log-likelihood of a step's samples that no step has, under the last weights."""
    padding: float = 0.0
    """Largest magnitude in the vocabulary's padding rows, at the end."""
    gathers: list[int] = field(default_factory=list)
    """Largest number of gathers of a parameter, each step."""


def samples(config: Recipe, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and labels [global_samples, sequence] of a step; uneven numbers have no loss, of the second
    sample all."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (config.batch.global_samples, config.batch.sequence_length)
    assert config.model.vocabulary is not None
    tokens = torch.randint(0, config.model.vocabulary, shape, generator=generator)
    labels = torch.randint(0, config.model.vocabulary, shape, generator=generator)
    lengths = torch.randint(0, config.batch.sequence_length, (shape[0], 1), generator=generator)
    lengths[1:2] = shape[1]
    return tokens, labels.masked_fill(torch.arange(shape[1]) < lengths, IGNORE)


def micro_batch(config: Recipe, tokens: torch.Tensor, labels: torch.Tensor) -> MicroBatch:
    batch, sequence = tokens.shape
    positions = torch.arange(sequence).expand(batch, sequence)
    bounds = None
    if config.data.document_masks:  # two segments a sample, the cut moving with the sample's first token
        cuts = [b * sequence + c for b in range(batch) for c in (0, 1 + int(tokens[b, 0]) % (sequence - 1))]
        bounds = [*cuts, batch * sequence]
        starts = torch.tensor(cuts)
        flat = torch.arange(batch * sequence)
        positions = (flat - starts[torch.searchsorted(starts, flat, right=True) - 1]).view(batch, sequence)
    return MicroBatch.whole(tokens, labels, positions, bounds)


def micro_batches(config: Recipe, mesh: Any, tokens: torch.Tensor, labels: torch.Tensor) -> list[MicroBatch]:
    """A rank's part of a step's samples."""
    from megacode.parallel.context import own_part

    size = config.batch.micro_samples
    firsts = range(mesh.data_rank * size, len(tokens), mesh.data * size)
    return [
        own_part(micro_batch(config, tokens[f : f + size], labels[f : f + size]), mesh.context, mesh.context_rank)
        for f in firsts
    ]


def reference(config: Recipe, steps: int, fused: bool = False) -> Outcome:
    """The training in one process: plain torch, fp32, no DeepSpeed; `fused` AdamW rounds a little differently."""
    sections = {key: getattr(config, key).model_dump(mode="json") for key in ("model", "batch", "optimizer")}
    data = {"train": "unused", "document_masks": config.data.document_masks}
    done = _reference(json.dumps({**sections, "data": data}), steps, fused)
    lists = {"losses": [*done.losses], "norms": [*done.norms]}
    return dataclasses.replace(done, **lists, gradients={**done.gradients}, weights={**done.weights})


@functools.cache
def _reference(sections: str, steps: int, fused: bool) -> Outcome:
    config = recipe(**json.loads(sections))
    model = initialise(Llama(config.model), SEED)
    section = config.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": section.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=section.learning_rate, betas=(section.beta1, section.beta2), eps=section.epsilon, fused=fused,
    )  # fmt: skip
    outcome = Outcome()
    for step in range(steps):
        tokens, labels = samples(config, step)
        optimizer.zero_grad()
        total = 0.0
        for i in range(len(tokens)):
            batch = micro_batch(config, tokens[i : i + 1], labels[i : i + 1])
            losses = model(batch.tokens, batch.positions, batch.segments, batch.labels)
            loss = losses.sum() / (labels != IGNORE).sum()
            loss.backward()
            total += loss.item()
        outcome.losses.append(total)
        if step == 0:
            outcome.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        outcome.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip or 1e9)))
        optimizer.step()
    outcome.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    batch = micro_batch(config, *samples(config, VALIDATION_STEP))
    with torch.no_grad():
        outcome.validation = float(model(batch.tokens, batch.positions, batch.segments, batch.labels).sum())
    return outcome


@contextlib.contextmanager
def count_gathers(counts: Counter) -> Iterator[None]:
    """Count, by parameter, the gathers that ZeRO-3 asks for."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    name = "_PartitionedParameterCoordinator__all_gather_params_"
    gather = getattr(Coordinator, name)

    def counted(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        counts.update(parameter.ds_id for parameter in params)
        return gather(self, params, *args, **kwargs)

    with mock.patch.object(Coordinator, name, counted):
        yield


def padding(engine: Any, name: str) -> float:
    from megacode.engine import private

    parameter = engine.parameters[name]
    part, local = part_of(parameter), private.read(parameter)
    if part.dim is None:
        return 0.0
    return float(local.narrow(part.dim, part.stop - part.start, local.shape[part.dim] - part.stop + part.start).norm())


def validation(config: Recipe, engine: Any, mesh: Any) -> float:
    """A validation in the recipe's layout, twice: the second goes by the trace that the first recorded."""
    tokens, labels = samples(config, VALIDATION_STEP)
    results = []
    for _ in range(2):
        total = engine.evaluate(micro_batches(config, mesh, tokens, labels))
        dist.all_reduce(total)
        results.append(float(total) / mesh.tensor)
    assert results[0] == results[1]
    return results[0]


@functools.cache
def _mesh(build: Any, *sizes: int) -> Any:
    """One mesh a process and layout: each gloo group polls in threads of its own, and a hundred would eat the cores."""
    return build(*sizes)


def parallel(
    config: Recipe, steps: int, without: tuple[str, ...] = (), load: Path | None = None, save: Path | None = None,
    validated: bool = True,
) -> list[Any]:  # fmt: skip
    """A rank's part of the training in the recipe's layout; `without` names cures to leave out, see WITHOUT.

    Goes on from the checkpoint `load` (for `steps` more steps) and leaves the checkpoint `save`, where given.

    Returns [outcome, {name: Slice}], with gradients and weights of this rank's tensors, on the first data rank only.
    """
    from megacode.checkpoint import store
    from megacode.checkpoint.reader import CheckpointReader, Progress
    from megacode.engine.zero import ZeroEngine, start_deepspeed
    from megacode.parallel import mesh as meshes
    from megacode.train.start import resume, writer

    start_deepspeed()
    plan = fit(config, dist.get_world_size())
    with contextlib.ExitStack() as stack:
        for name in without:
            stack.enter_context(mock.patch(*WITHOUT[name]()))
        mesh = _mesh(meshes.build_mesh, plan.pipeline, plan.data, plan.tensor, plan.context)
        engine = ZeroEngine(config, plan, mesh, torch.device("cpu"))
        progress = Progress(0, 0, 0, SEED, config.batch.sequence_length, 0)
        if load is not None:
            progress = resume(engine, CheckpointReader(load), mesh)
        else:
            for name, parameter in engine.parameters.items():
                part = part_of(parameter)
                engine.write(name, part.take(initial_values(name, part, SEED)))
        first = progress.step
        outcome, counts = Outcome(), Counter()
        stack.enter_context(count_gathers(counts))
        for step in range(first, first + steps):
            tokens, labels = samples(config, step)
            counts.clear()
            batches = micro_batches(config, mesh, tokens, labels)
            loss = engine.train_step(batches, mesh.zero_size / (labels != IGNORE).sum())
            if step == first:
                outcome.gradients = {name: engine.read(name, "gradient").float().clone() for name in engine.parameters}
            outcome.norms.append(float(engine.update(config.optimizer.learning_rate)[0]))
            # Every tensor rank of the last stage has the same loss.
            dist.all_reduce(loss)
            outcome.losses.append(float(loss.sum() / (labels != IGNORE).sum() / mesh.tensor))
            outcome.gathers.append(max(counts.values(), default=0))
        outcome.weights = {name: engine.read(name).clone() for name in engine.parameters}
        outcome.validation = validation(config, engine, mesh) if validated else None
        outcome.padding = max(padding(engine, name) for name in engine.parameters)
        parts = {name: part_of(parameter) for name, parameter in engine.parameters.items()}
        if save is not None:
            done = first + steps
            samples_done = done * config.batch.global_samples
            progress = Progress(done, samples_done, engine.optimizer_step, SEED, config.batch.sequence_length, 0)
            store.save(save, config, progress, parts, engine, writer(mesh))
        engine.engine.destroy()
    return [outcome if mesh.zero_rank == 0 else Outcome(outcome.losses, outcome.norms, gathers=outcome.gathers), parts]


def values_read(config: Recipe, load: Path) -> tuple[int, int, float]:
    """How many values of weights and of moments this rank reads at a resume, and the largest padding after it.

    Of engine memory that holds no numbers before.
    """
    from megacode.checkpoint.reader import CheckpointReader
    from megacode.engine import private
    from megacode.engine.zero import ZeroEngine, start_deepspeed
    from megacode.parallel import mesh as meshes
    from megacode.train.start import resume

    start_deepspeed()
    plan = fit(config, dist.get_world_size())
    mesh = _mesh(meshes.build_mesh, plan.pipeline, plan.data, plan.tensor, plan.context)
    engine, reader = ZeroEngine(config, plan, mesh, torch.device("cpu")), CheckpointReader(load)
    for values in [*engine.parameters.values(), *private.masters(engine.zero)]:
        getattr(values, "ds_tensor", values).data.fill_(float("nan"))
    counts, read = Counter(), reader.read_part

    def counted(name: str, part: Slice, key: str, rows: range) -> torch.Tensor:
        value = read(name, part, key, rows)
        counts[key == "weight"] += value.numel()
        return value

    with mock.patch.object(reader, "read_part", counted):
        resume(engine, reader, mesh)
    padded = max(padding(engine, name) for name in engine.parameters)
    engine.engine.destroy()
    return counts[True], counts[False], padded


def move(config: Recipe, load: Path, save: Path) -> int:
    """Load a checkpoint into the recipe's layout and save it from there, without a step; Adam's step count."""
    from megacode.checkpoint import store
    from megacode.checkpoint.reader import CheckpointReader
    from megacode.engine.zero import ZeroEngine, start_deepspeed
    from megacode.parallel import mesh as meshes
    from megacode.train.start import resume, writer

    start_deepspeed()
    plan = fit(config, dist.get_world_size())
    mesh = _mesh(meshes.build_mesh, plan.pipeline, plan.data, plan.tensor, plan.context)
    engine = ZeroEngine(config, plan, mesh, torch.device("cpu"))
    progress = resume(engine, CheckpointReader(load), mesh)
    parts = {name: part_of(parameter) for name, parameter in engine.parameters.items()}
    store.save(save, config, progress, parts, engine, writer(mesh))
    count = engine.optimizer_step
    engine.engine.destroy()
    return count


def fetches(config: Recipe, without: tuple[str, ...]) -> int:
    """How often ZeRO-3's hooks ask for the parameters of a module, on this rank in one step."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    fetch, calls = Coordinator.fetch_sub_module, Counter()

    def counted(self: Any, module: Any, forward: bool) -> Any:
        calls.update([self])
        return fetch(self, module, forward=forward)

    with mock.patch.object(Coordinator, "fetch_sub_module", counted):
        parallel(config, 1, without=without)
    return max(calls.values())  # a validation has a coordinator of its own, and forwards only


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _world_trace() -> tuple[str, Any]:
    from deepspeed.runtime.zero import partitioned_param_coordinator, utils

    def restore(group: Any) -> None:
        partitioned_param_coordinator.assert_ints_same_as_other_ranks = utils.assert_ints_same_as_other_ranks

    return "megacode.engine.private.check_traces_within", restore


def _world_partitions() -> tuple[str, Any]:
    import deepspeed

    init = deepspeed.zero.Init
    return "deepspeed.zero.Init", lambda data_parallel_group, mpu, **kwargs: init(**kwargs)


def _divided_by_accumulation() -> tuple[str, Any]:
    from megacode.engine.config import deepspeed_config

    def config(recipe: Recipe) -> dict[str, Any]:
        return {**deepspeed_config(recipe), "gradient_accumulation_steps": 4}

    return "megacode.engine.zero.deepspeed_config", config


def _bf16_partitions() -> tuple[str, Any]:
    from megacode.engine.config import deepspeed_config

    def config(recipe: Recipe) -> dict[str, Any]:
        return {key: value for key, value in deepspeed_config(recipe).items() if key != "data_types"}

    return "megacode.engine.zero.deepspeed_config", config


def _forced_cpu_adam() -> tuple[str, Any]:
    from megacode.engine.config import deepspeed_config

    def config(recipe: Recipe) -> dict[str, Any]:
        return {**deepspeed_config(recipe), "zero_force_ds_cpu_optimizer": True}

    # As if there were no compiler, and nothing compiled before: else it takes a minute. The world ends with the case.
    os.environ.update(CXX="/no/such/compiler", TORCH_EXTENSIONS_DIR=tempfile.mkdtemp())
    return "megacode.engine.zero.deepspeed_config", config


def _data_group_without_context() -> tuple[str, Any]:
    from megacode.parallel.mesh import Mesh, build_mesh

    def build(*sizes: int) -> Mesh:
        mesh = build_mesh(*sizes)
        assert mesh.data == 1
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        return dataclasses.replace(mesh, data_group=alone[mesh.rank])

    return "megacode.parallel.mesh.build_mesh", build


WITHOUT: dict[str, Any] = {
    "check_traces_within": _world_trace,
    "start_backward": lambda: ("megacode.engine.private.start_backward", _nothing),
    "mark_norm_owner": lambda: ("megacode.engine.private.mark_norm_owner", _nothing),
    "accumulation of 1": _divided_by_accumulation,
    "torch's Adam under offload": _forced_cpu_adam,
    "own_the_trace": lambda: ("megacode.engine.private.own_the_trace", _nothing),
    "gather_whole": lambda: ("megacode.engine.private.gather_whole", _nothing),
    "zero.Init_group": _world_partitions,
    "sum_gradients": lambda: ("megacode.engine.private.sum_gradients", _nothing),
    "clear_partitions": lambda: ("megacode.engine.private.clear_partitions", _nothing),
    "keep_leftovers": lambda: ("megacode.engine.private.keep_leftovers", lambda zero: _nothing),
    "context in the data group": _data_group_without_context,
    "fp32 partitions": _bf16_partitions,
    "Fp32Gradients": lambda: ("megacode.engine.private.Fp32Gradients", lambda parameters: None),
}
"""Each cure of running a pipeline over ZeRO engines, as what to patch to leave it out."""


def deviation(expected: Outcome, ranks: list[tuple[Outcome, dict[str, Slice]]]) -> dict[str, float]:
    """Largest relative differences of loss, validation and norm, of gradients (to the tensor's norm), and absolute of
    weights; "all gradients" is that of the gradient but the embedding's as one vector.
    """
    validation = 0.0
    for outcome, _ in ranks:
        if outcome.validation is not None:
            assert expected.validation is not None
            validation = max(validation, abs(outcome.validation - expected.validation) / expected.validation)
    off = doctor.compare([dataclasses.replace(outcome, parts=parts) for outcome, parts in ranks], expected)
    return {
        "loss": off.loss,
        "validation": validation,
        "norm": off.norm,
        "gradient": off.worst[1],
        "weight": off.weight,
        "all gradients": off.gradient,
    }


def _stretches_of(step: int) -> Any:
    from megacode.engine import gather

    def cut(_: Any, size: int) -> Iterator[range]:
        return (range(start, min(start + step, size)) for start in range(0, size, step))

    return mock.patch.object(gather._Landing, "stretches", cut)


def snapshots(config: Recipe) -> tuple[list[tuple[str, str]], bool]:
    """What this rank keeps of a checkpoint after a step, and whether it is bit for bit what `ZeroEngine.read` gives."""
    from megacode.checkpoint.store import KEYS, Share
    from megacode.engine.zero import ZeroEngine, start_deepspeed
    from megacode.parallel import mesh as meshes
    from megacode.train.start import writer

    start_deepspeed()
    plan = fit(config, dist.get_world_size())
    mesh = _mesh(meshes.build_mesh, plan.pipeline, plan.data, plan.tensor, plan.context)
    engine = ZeroEngine(config, plan, mesh, torch.device("cpu"))
    for name, parameter in engine.parameters.items():
        part = part_of(parameter)
        engine.write(name, part.take(initial_values(name, part, SEED)))
    tokens, labels = samples(config, 0)
    engine.train_step(micro_batches(config, mesh, tokens, labels), mesh.zero_size / (labels != IGNORE).sum())
    engine.update(config.optimizer.learning_rate)
    share = Share({name: part_of(parameter) for name, parameter in engine.parameters.items()}, engine, writer(mesh))
    values = {(name, key): engine.read(name, key) for name in engine.parameters for key in KEYS}
    equal = True
    for step in (None, None, 1000):  # where the kept tensors stay, and in stretches, as on a GPU
        with _stretches_of(step) if step else contextlib.nullcontext():
            share.copy()
        equal &= all(torch.equal(values[place], kept) for place, kept in share.values.items())
        for kept in share.values.values():
            kept.zero_()
    moved = all(float(each.abs().max()) > 0 for each in values.values())
    engine.engine.destroy()
    return list(share.values), equal and moved
