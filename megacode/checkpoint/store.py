"""Checkpoints that know no layout: safetensors files of parts, and a manifest of global names, shapes and slices.

A folder step_00000100/ holds manifest.json, recipe.yaml, tokenizer.model, and for each rank that keeps something
weights_RANK.safetensors (fp32) and optimizer_RANK.safetensors (Adam's moments). Which data rank keeps a parameter, the
engine says; where it is, the manifest. A save has three parts: `begin` (a folder *.partial), `Share.copy` and
`Share.write` (each rank's own: to host memory, and from there to files) and `finish` (the manifest, and the folder's
name). `save` is all of them in a row; a run copies, trains on, and writes meanwhile.
"""

import hashlib
import json
import math
import os
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megacode.checkpoint import keep
from megacode.checkpoint.keep import PARTIAL
from megacode.checkpoint.reader import FORMAT, OPTIMIZER, STATES, Progress, global_order, sealed
from megacode.checkpoint.tensorfile import TensorFile
from megacode.data.durable import sync
from megacode.errors import UserError, explain
from megacode.model.layers import Slice
from megacode.recipe import Recipe

KEYS = ("weight", *STATES)


class Holder(Protocol):
    """Who has the tensors of a run: its engine. Both calls are collective over the data ranks."""

    def keepers(self) -> Mapping[str, int]:
        """The data rank that keeps each parameter of this stage, in the order in which they are best copied."""
        ...

    def gather(self, pieces: Sequence[tuple[str, str, int, Tensor | None]]) -> None:
        """Copy tensors to host memory.

        Of each: global name, "weight" or a state, the data rank that keeps it, and there an fp32 tensor to fill, of the
        shape of this tensor rank's part without padding; None elsewhere.
        """
        ...


@dataclass(frozen=True)
class Writer:
    """What a save must know of a rank: who it is among those that hold the same, and how ranks talk."""

    rank: int
    zero_rank: int
    tensor_rank: int
    gather: Callable[[Any], list[Any] | None]
    """Collects an object of each rank on rank 0; None elsewhere."""
    broadcast: Callable[[Any], Any]
    """Rank 0's object, on every rank."""


@dataclass(frozen=True)
class Report:
    """What a rank has written."""

    rank: int
    files: dict[str, Any]
    """Name -> bytes, sha256."""
    tensors: dict[str, Any]
    """Name -> shape, dim, start, stop."""
    problem: str | None
    """Why it could not be written."""


class StoppedError(Exception):
    """Writing was told to stop."""


def step_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step_{step:08d}"


def save(
    folder: Path, recipe: Recipe, progress: Progress, parts: dict[str, Slice], holder: Holder, writer: Writer
) -> str | None:
    """Write a checkpoint and wait for it; every rank calls it. The folder appears, whole, when all ranks have written.

    Args:
        folder: the checkpoint's folder; it must not exist.
        recipe: saved beside the weights, with a copy of its tokenizer.
        progress: where the run stands.
        parts: this rank's parameters by global name, in the order in which all ranks of the stage hold them.
        holder: copies tensors to the host.
        writer: this rank's place.

    Returns and raises as `finish`.
    """
    share = Share(parts, holder, writer)
    begin(folder, writer)
    share.copy()
    return finish(folder, recipe, progress, share.write(folder), writer)


class Share:
    """What this rank keeps of checkpoints, in host memory that stays from one save to the next. Collective.

    Args:
        parts: this rank's parameters by global name, in the order in which all ranks of the stage hold them.
        holder: has them.
        writer: this rank's place.
        pinned: have the memory pinned, for a GPU to copy to.

    Attributes:
        num_bytes: of that memory.
        values: (global name, "weight" or a state) -> what was copied last.
    """

    def __init__(self, parts: dict[str, Slice], holder: Holder, writer: Writer, pinned: bool = False) -> None:
        self.rank, self._holder = writer.rank, holder
        keepers = holder.keepers()
        # What is split over tensor ranks each of them keeps its part of; of the rest the first keeps the whole.
        kept = {name: part for name, part in parts.items() if part.dim is not None or writer.tensor_rank == 0}
        mine = {name: part for name, part in kept.items() if keepers[name] == writer.zero_rank}
        self.tensors = {
            name: {"shape": list(part.shape), "dim": part.dim, "start": part.start, "stop": part.stop}
            for name, part in mine.items()
        }
        shapes = {name: tuple(part.take(torch.empty(part.shape, device="meta")).shape) for name, part in mine.items()}
        memory = torch.empty(sum(len(KEYS) * math.prod(shape) for shape in shapes.values()))
        self.num_bytes = memory.nbytes
        if pinned and self.num_bytes:
            _pin(memory)
            # The allocator may give this memory to others once it is free, and they may want to pin it.
            weakref.finalize(self, _unpin, memory).atexit = False
        pieces = memory.split([math.prod(shape) for shape in shapes.values() for _ in KEYS])
        places = [(name, key) for name in shapes for key in KEYS]
        self.values = {place: piece.view(shapes[place[0]]) for place, piece in zip(places, pieces, strict=True)}
        self._pieces = [
            (name, key, keeper, self.values.get((name, key)))
            for name, keeper in keepers.items()
            if name in kept
            for key in KEYS
        ]

    def copy(self) -> None:
        """Copy this moment's values to the host. Collective; what was there must have been written."""
        self._holder.gather(self._pieces)

    def write(self, folder: Path, stop: Callable[[], bool] = lambda: False) -> Report:
        """Write the files, and have them on the disk. No collective and no device: a thread may do it.

        Args:
            folder: the checkpoint's; `begin` has made the one that is written to.
            stop: asked before each tensor.

        Raises:
            StoppedError: `stop` said so.
        """
        partial, files = _partial(folder), {}
        path, problem = partial, None
        try:
            for kind, keys in (("weights", ("weight",)), ("optimizer", STATES)):
                path = partial / f"{kind}_{self.rank:05d}.safetensors"
                tensors = {
                    (name if key == "weight" else f"{name}.{key}"): self.values[name, key]
                    for name in self.tensors
                    for key in keys
                }
                if tensors:
                    files[path.name] = _write_file(path, tensors, stop)
        except OSError as error:
            problem = explain(error, path)
        return Report(self.rank, files, self.tensors, problem)


def _pin(memory: Tensor) -> None:
    """Not by pin_memory, which takes powers of two: up to twice the memory."""
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    torch.cuda.check_error(int(error))


def _unpin(memory: Tensor) -> None:
    error = torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
    torch.cuda.check_error(int(error))


def _write_file(path: Path, tensors: dict[str, Tensor], stop: Callable[[], bool]) -> dict[str, Any]:
    with TensorFile(path, {name: (each.dtype, tuple(each.shape)) for name, each in tensors.items()}) as file:
        for name, tensor in tensors.items():
            if stop():
                raise StoppedError
            file.write(name, tensor)
    return {"bytes": file.num_bytes, "sha256": file.sha256}


def begin(folder: Path, writer: Writer, must_hold: Path | None = None) -> None:
    """Make the folder that a checkpoint is written to, in place of what a killed run left there. Collective.

    Args:
        folder: the checkpoint's.
        writer: this rank's place.
        must_hold: a file that must be there: what is gone (a disk unmounted, a run folder removed) must not come up
            again somewhere else.

    Raises:
        UserError: it can't be made; raised on every rank.
    """
    partial = _partial(folder)

    def make() -> None:
        if must_hold is not None:
            must_hold.stat()
        if partial.exists():
            shutil.rmtree(partial)
        if not partial.parent.exists():
            partial.parent.mkdir(parents=True)
            sync(partial.parent.parent)
        partial.mkdir()

    _agree(writer, folder, _try(make, partial) if writer.rank == 0 else None)


def finish(folder: Path, recipe: Recipe, progress: Progress, report: Report | None, writer: Writer) -> str | None:
    """Complete a checkpoint that all ranks have written their shares of, and give it its name. Collective.

    Args:
        report: this rank's; None where it was told to stop.

    Returns:
        On rank 0, what went wrong once it had its name: it stands whole, but `latest` may name another, and a power
        loss may take the name. None: nothing, or another rank.

    Raises:
        UserError: a rank could not write; raised on every rank, and nothing is left of it.
    """
    reports = writer.gather(report)
    problem = None
    if reports is not None:
        problem = next((each.problem for each in reports if each is not None and each.problem), None)
        problem = problem or _try(lambda: _complete(folder, recipe, progress, reports), folder)
        if problem is not None:
            shutil.rmtree(_partial(folder), ignore_errors=True)  # a full disk has room for the reason then
    _agree(writer, folder, problem)
    return _try(lambda: _settle(folder), folder) if reports is not None else None


def _agree(writer: Writer, folder: Path, problem: str | None) -> None:
    """Rank 0's problem, if any, is raised on every rank."""
    if problem is not None:
        last = keep.newest(folder.parent.parent)
        left = f"{last} is the run's last good one" if last else "the run has none yet"
        problem = f"the checkpoint {folder} could not be written: {problem}, then start again; {left}"
    problem = writer.broadcast(problem)
    if problem is not None:
        raise UserError(problem)


def _complete(folder: Path, recipe: Recipe, progress: Progress, reports: list[Report]) -> None:
    partial = _partial(folder)
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for report in reports:
        files |= report.files
        for name, entry in report.tensors.items():
            whole = tensors.setdefault(name, {"shape": entry["shape"], "dim": entry["dim"], "slices": []})
            whole["slices"].append({"rank": report.rank, "start": entry["start"], "stop": entry["stop"]})
    for name, entry in files.items():
        if (size := (partial / name).stat().st_size) != entry["bytes"]:
            raise OSError(f"{partial / name} has {size} bytes where {entry['bytes']} were written")
    tokenizer = Path(recipe.tokenizer.path).read_bytes()
    files["tokenizer.model"] = {"bytes": len(tokenizer), "sha256": hashlib.sha256(tokenizer).hexdigest()}
    manifest = {
        "format": FORMAT,
        "world_size": len(reports),
        "progress": asdict(progress),
        "model": recipe.model.model_dump(mode="json"),
        "precision": recipe.precision,
        "dtype": "fp32",
        "optimizer": OPTIMIZER,
        "files": files,
        "tensors": {name: tensors[name] for name in sorted(tensors, key=global_order)},
    }
    recipe.save(partial / "recipe.yaml")
    (partial / "tokenizer.model").write_bytes(tokenizer)
    (partial / "manifest.json").write_text(json.dumps(sealed(manifest), indent=1), encoding="utf-8")
    sync(*(partial / name for name in ("recipe.yaml", "tokenizer.model", "manifest.json")), partial)
    os.replace(partial, folder)


def _settle(folder: Path) -> None:
    sync(folder.parent)
    keep.point_to(folder)


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL)


def _try(action: Callable[[], None], path: Path) -> str | None:
    """What an OSError says, with the mend, or None."""
    try:
        action()
    except OSError as error:
        return explain(error, path)
    return None
