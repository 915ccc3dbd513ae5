"""Checkpoints that know no layout: safetensors files of parts, and a manifest of global names, shapes and slices.

A folder step_00000100/ holds manifest.json, recipe.yaml, tokenizer.model, and for each rank that keeps something
weights_RANK.safetensors (fp32) and optimizer_RANK.safetensors (Adam's moments). Parameter i of a stage is kept by data
rank i mod data ranks: device memory of one parameter and its moments, host memory of the rank's share.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacode.checkpoint.reader import FORMAT, OPTIMIZER, STATES, Progress, global_order
from megacode.checkpoint.tensorfile import TensorFile
from megacode.model.layers import Slice
from megacode.recipe import Recipe

Read = Callable[[str, str], Tensor]
"""(global name, "weight" or a state) -> this tensor rank's part without padding, fp32; collective over data ranks."""


@dataclass(frozen=True)
class Writer:
    """What `save` must know of a rank: who it is among those that hold the same, and how ranks talk."""

    rank: int
    zero_rank: int
    zero_size: int
    tensor_rank: int
    gather: Callable[[Any], list[Any] | None]
    """Collects an object of each rank on rank 0; None elsewhere."""
    broadcast: Callable[[Any], Any]
    """Rank 0's object, on every rank."""


def step_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step_{step:08d}"


def newest(run: Path) -> Path | None:
    """The newest finished checkpoint of a run; one still being written has another name."""
    folders = sorted((run / "checkpoints").glob("step_" + "[0-9]" * 8))
    return folders[-1] if folders else None


def save(folder: Path, recipe: Recipe, progress: Progress, parts: dict[str, Slice], read: Read, writer: Writer) -> None:
    """Write a checkpoint; every rank calls it. The folder appears, whole, only when every rank has written its share.

    Args:
        folder: the checkpoint's folder; it must not exist.
        recipe: saved beside the weights, with a copy of its tokenizer.
        progress: where the run stands.
        parts: this rank's parameters by global name, in the order in which all ranks of the stage hold them.
        read: gives a part.
        writer: this rank's place.

    Raises:
        OSError: a rank could not write; raised on every rank, and what was written keeps the name *.partial.
    """
    partial = folder.with_name(folder.name + ".partial")

    def begin() -> None:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)

    _agree(writer, _try(begin) if writer.rank == 0 else None)
    reports = writer.gather(_write_share(partial, parts, read, writer))
    problem = None
    if reports is not None:
        problem = next((report["problem"] for report in reports if report["problem"]), None)
        problem = problem or _try(lambda: _finish(partial, folder, recipe, progress, reports))
    _agree(writer, problem)


def _agree(writer: Writer, problem: str | None) -> None:
    """Rank 0's problem, if any, is raised on every rank."""
    problem = writer.broadcast(problem)
    if problem is not None:
        raise OSError(f"the checkpoint could not be written: {problem}")


def _write_share(partial: Path, parts: dict[str, Slice], read: Read, writer: Writer) -> dict[str, Any]:
    weights: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    tensors: dict[str, Any] = {}
    for number, (name, part) in enumerate(parts.items()):
        values = {key: read(name, key) for key in ("weight", *STATES)}
        mine = number % writer.zero_size == writer.zero_rank and (part.dim is not None or writer.tensor_rank == 0)
        if not mine:
            continue
        weights[name] = values["weight"].cpu().contiguous()
        states |= {f"{name}.{key}": values[key].cpu().contiguous() for key in STATES}
        tensors[name] = {"shape": list(part.shape), "dim": part.dim, "start": part.start, "stop": part.stop}
    files: dict[str, Any] = {}

    def write() -> None:
        for kind, content in (("weights", weights), ("optimizer", states)):
            if content:
                path = partial / f"{kind}_{writer.rank:05d}.safetensors"
                declared = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in content.items()}
                with TensorFile(path, declared) as file:
                    for name, tensor in content.items():
                        file.write(name, tensor)
                files[path.name] = {"bytes": file.num_bytes, "sha256": file.sha256}

    return {"problem": _try(write), "rank": writer.rank, "files": files, "tensors": tensors}


def _finish(partial: Path, folder: Path, recipe: Recipe, progress: Progress, reports: list[dict[str, Any]]) -> None:
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for report in reports:
        files |= report["files"]
        for name, entry in report["tensors"].items():
            whole = tensors.setdefault(name, {"shape": entry["shape"], "dim": entry["dim"], "slices": []})
            whole["slices"].append({"rank": report["rank"], "start": entry["start"], "stop": entry["stop"]})
    manifest = {
        "format": FORMAT,
        "progress": asdict(progress),
        "model": recipe.model.model_dump(mode="json"),
        "precision": recipe.precision,
        "dtype": "fp32",
        "optimizer": OPTIMIZER,
        "start_from": recipe.checkpoint.start_from,
        "files": files,
        "tensors": {name: tensors[name] for name in sorted(tensors, key=global_order)},
    }
    recipe.save(partial / "recipe.yaml")
    shutil.copyfile(recipe.tokenizer.path, partial / "tokenizer.model")
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(partial / "manifest.json")
    os.replace(partial, folder)


def _sync(path: Path) -> None:
    """Have the file on the disk, not only in memory, before the folder gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _try(action: Callable[[], None]) -> str | None:
    """The message of an OSError, or None."""
    try:
        action()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None
