"""How a run starts: its data, its weights or the checkpoint it goes on from, and what must not be mixed up."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megacode.checkpoint import keep
from megacode.checkpoint.origin import new_stage_from, open_weights
from megacode.checkpoint.reader import OPTIMIZER, STATES, CheckpointReader, Progress
from megacode.checkpoint.store import Writer
from megacode.data.stream import ORDER, TrainStream, ValidationStream, open_train, open_valid
from megacode.data.tokenizer import Tokenizer
from megacode.engine.zero import ZeroEngine
from megacode.errors import UserError
from megacode.model.layers import initial_values, part_of
from megacode.parallel.heartbeat import communicating, doing
from megacode.parallel.mesh import Mesh
from megacode.recipe import Recipe


def open_streams(recipe: Recipe, tokenizer: Tokenizer) -> tuple[TrainStream, ValidationStream | None]:
    """The recipe's training and validation streams.

    Raises:
        UserError: shards are missing, damaged, too short or of another tokenizer.
    """
    data, length = recipe.data, recipe.batch.sequence_length
    return open_train(data, tokenizer, length, recipe.seed), open_valid(data, tokenizer, length)


def new_progress(recipe: Recipe, stream: TrainStream) -> Progress:
    """That of a run which begins."""
    return Progress(
        0, 0, 0, recipe.seed, recipe.batch.sequence_length, stream.num_tokens, packing=recipe.data.packing,
        order=ORDER, sources=stream.facts(), begun_from=_begun_from(recipe),
    )  # fmt: skip


def check_run_folder(recipe: Recipe, stream: TrainStream) -> None:
    """Refuse to go on with a run whose checkpoints are of another model, tokenizer, seed, corpus or order of samples,
    and to start a new stage in the folder of a run.

    Raises:
        UserError: names the key that differs.
    """
    newest = keep.newest(Path(recipe.run))
    if newest is None:
        if recipe.checkpoint.start_from is not None:
            open_weights(recipe, Path(recipe.checkpoint.start_from), new_stage=True)
        return
    reader = open_weights(recipe, newest)
    if reader.optimizer != OPTIMIZER:
        whose = f"the states of {reader.optimizer}" if reader.optimizer else "weights alone"
        raise UserError(
            f"{newest} has {whose}, and a run goes on with those of {OPTIMIZER}; name another `run` folder and "
            f"take its weights by checkpoint.start_from"
        )
    here, there = (_counted_by(progress) for progress in (new_progress(recipe, stream), reader.progress))
    for key in here:
        if here[key] != there.get(key):
            raise UserError(
                f"{key} is {here[key]} and {newest} has {there.get(key)}, by which it counts its samples; change it "
                f"back, or {new_stage_from(newest)}"
            )
    begun_from = reader.progress.begun_from
    if recipe.checkpoint.start_from is not None and _begun_from(recipe) != begun_from:
        raise UserError(
            f"checkpoint.start_from is {recipe.checkpoint.start_from} and the run in {recipe.run} has begun "
            f"{'from ' + begun_from if begun_from else 'at random weights'}; name another `run` folder for a new "
            f"stage, or leave checkpoint.start_from out to go on"
        )


def _begun_from(recipe: Recipe) -> str | None:
    """The same folder by whatever path it is named."""
    start_from = recipe.checkpoint.start_from
    return None if start_from is None else str(Path(start_from).resolve())


def _counted_by(progress: Progress) -> dict[str, Any]:
    """What gives the numbers of samples their meaning, by name."""
    facts: dict[str, Any] = {
        "seed": progress.seed,
        "batch.sequence_length": progress.sequence_length,
        "data.packing": progress.packing,
        "the version of the order of samples": progress.order,
        "data.train (names of sources)": ", ".join(progress.sources),
    }
    for name, source in progress.sources.items():
        for key, value in source.items():
            facts[f"data.train ({key.replace('_', ' ')} of {name})"] = value
    return facts


def describe_weights(recipe: Recipe) -> str:
    """What a new run starts from, in words."""
    if recipe.checkpoint.start_from is None:
        return f"random weights of seed {recipe.seed}"
    reader = CheckpointReader(Path(recipe.checkpoint.start_from))
    text = f"the weights of {reader.folder}" + (f" (its step {reader.step})" if reader.step else "")  # 0: converted
    if recipe.model.rope_theta != reader.model.rope_theta:
        text += f", with model.rope_theta {recipe.model.rope_theta:g} instead of {reader.model.rope_theta:g}"
    return text


def load_weights(engine: ZeroEngine, recipe: Recipe, mesh: Mesh, newest: Path | None, new: Progress) -> Progress:
    """Fill the engine from the newest checkpoint, or for a new run from `checkpoint.start_from` or at random.

    Returns that checkpoint's progress, or `new`, that of a new run.

    Raises:
        UserError: a file is damaged.
    """
    if newest is not None:
        return resume(engine, CheckpointReader(newest), mesh)
    source = recipe.checkpoint.start_from
    reader = CheckpointReader(Path(source)) if source else None
    if reader is not None:
        _verify(reader, mesh)
    for name, parameter in engine.parameters.items():
        doing(f"{'reading' if reader else 'initial values of'} {name}", patient=reader is not None)
        part = part_of(parameter)
        if reader is None:
            engine.write(name, part.take(initial_values(name, part, recipe.seed)))
        elif rows := engine.rows(name):
            engine.write(name, reader.read_part(name, part, rows=rows), first_row=rows.start)
    return new


def resume(engine: ZeroEngine, reader: CheckpointReader, mesh: Mesh) -> Progress:
    """Load weights, Adam's state and progress from a checkpoint of any layout, after checking its files.

    Raises:
        UserError: a file is missing or damaged.
    """
    _verify(reader, mesh)
    engine.set_optimizer_step(reader.progress.adam_step)
    for name, parameter in engine.parameters.items():
        doing(f"reading {name}", patient=True)
        for key in ("weight", *STATES):
            if rows := engine.rows(name, key):
                engine.write(name, reader.read_part(name, part_of(parameter), key, rows), key, rows.start)
    return reader.progress


def _verify(reader: CheckpointReader, mesh: Mesh) -> None:
    """Check every file once, shared by the ranks; what one finds is raised on all."""
    problem = None
    doing("verifying a checkpoint", patient=True)
    try:
        reader.verify(mesh.rank, dist.get_world_size())
    except UserError as error:
        problem = str(error)
    ranks = writer(mesh)
    problems = ranks.gather(problem)
    problem = ranks.broadcast(problems and next(filter(None, problems), None))
    if problem is not None:
        raise UserError(problem)


def writer(mesh: Mesh) -> Writer:
    """This rank, as `store.save` asks for it."""
    group = mesh.control_group

    def gather(value: Any) -> list[Any] | None:
        collected: list[Any] | None = [None] * dist.get_world_size() if mesh.rank == 0 else None
        with communicating("gather", "world"):
            dist.gather_object(value, collected, group=group)
        return collected

    def broadcast(value: Any) -> Any:
        box = [value]
        with communicating("broadcast", "world"):
            dist.broadcast_object_list(box, group=group)
        return box[0]

    return Writer(mesh.rank, mesh.zero_rank, mesh.tensor_rank, gather, broadcast)
