"""Checkpoints that know no layout: safetensors files of parts, and a manifest of global names, shapes and slices.

A folder step_00000100/ holds manifest.json, recipe.yaml, tokenizer.model, and for each rank that keeps something
weights_RANK.safetensors (fp32) and optimizer_RANK.safetensors (Adam's moments). Parameter i of a stage is kept by data
rank i mod data ranks: device memory of one parameter and its moments, host memory of the rank's share.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megacode.errors import UserError
from megacode.model.layers import Slice
from megacode.recipe import ModelSection, Recipe

FORMAT = 1
STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """Where a run stands. There is no stateful random generator: every draw is a function of the seed and a counter."""

    step: int
    """Optimizer steps done."""
    next_sample: int
    """Number of the first training sample that no step has used yet."""
    adam_step: int
    """Adam's step count (bias correction)."""
    seed: int
    """The run's seed."""
    sequence_length: int
    """Tokens of a sample: sample numbers have a meaning only together with this and the corpus."""
    num_tokens: int
    """Length of the training corpus."""
    packing: str = "concatenate"
    """How it is cut into samples."""
    order: int = 1
    """Version of the order of samples."""
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the samples are blended of, in order: source -> weight, tokens, samples of an epoch, hash."""
    ledger: dict[str, dict[str, int]] = field(default_factory=dict)
    """What all steps have seen, those whose update was left out too: source -> samples, labels with loss, and those of
    them in infilling documents."""


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
                save_file(content, path)
                _sync(path)
                files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}

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
        "files": files,
        "tensors": {name: tensors[name] for name in sorted(tensors, key=global_order)},
    }
    recipe.save(partial / "recipe.yaml")
    shutil.copyfile(recipe.tokenizer.path, partial / "tokenizer.model")
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(partial / "manifest.json")
    os.replace(partial, folder)


def global_order(name: str) -> tuple[int, int, str]:
    """Sorts names of parameters as the model has them: embedding, layers by number, last norm, head."""
    words = name.split(".")
    if "layers" in words:
        return 1, int(words[words.index("layers") + 1]), name
    return (0 if "embed_tokens" in name else 2 if "norm" in name else 3), 0, name


class CheckpointReader:
    """A finished checkpoint, read tensor by tensor.

    Attributes:
        names: global names in the model's order.
        model: the model's shape, vocabulary filled in.
        progress: where the run stood.
        precision: "bf16" or "fp32", the run's arithmetic; the weights are the fp32 masters.

    Raises:
        UserError: the folder holds no checkpoint, or one of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{folder} holds no checkpoint (manifest.json: {error.strerror}); name a step_* folder of a run"
            ) from None
        except ValueError:
            raise UserError(f"{path} is damaged (not JSON); remove the folder to go on from an earlier one") from None
        if manifest.get("format") != FORMAT:
            raise UserError(f"{path} has format {manifest.get('format')}, this megacode reads {FORMAT}")
        self.manifest = manifest
        self.names: list[str] = list(manifest["tensors"])
        self.model = ModelSection.model_validate(manifest["model"])
        self.progress = Progress(**manifest["progress"])
        self.precision: str = manifest["precision"]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    @property
    def tokenizer_path(self) -> Path:
        """The run's SentencePiece model."""
        return self.folder / "tokenizer.model"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return tuple(self.manifest["tensors"][name]["shape"])

    def read(self, name: str, key: str = "weight") -> Tensor:
        """The whole parameter, or one of its Adam states, fp32."""
        shape = self.shape(name)
        return self.read_part(name, Slice(shape, 1.0), key)

    def read_part(self, name: str, part: Slice, key: str = "weight") -> Tensor:
        """The part of a parameter that a rank of any layout holds: only the slices that overlap it are read."""
        entry = self.manifest["tensors"][name]
        shape = list(entry["shape"])
        assert tuple(shape) == part.shape, f"{name}: {shape} in the checkpoint, {part.shape} in the model"
        dim = entry["dim"] if part.dim is None else part.dim
        if dim is None:
            return self._read_slice(entry["slices"][0]["rank"], name, key, None, 0, 0)
        start, stop = (0, shape[dim]) if part.dim is None else (part.start, part.stop)
        pieces = []
        for piece in sorted(entry["slices"], key=lambda s: s["start"]):
            whole = entry["dim"] is None
            low, high = (0, shape[dim]) if whole else (piece["start"], piece["stop"])
            first, last = max(start, low), min(stop, high)
            if first < last:
                pieces.append(self._read_slice(piece["rank"], name, key, dim, first - low, last - low))
        value = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
        if value.shape[dim] != stop - start:
            raise UserError(
                f"{self.folder}/manifest.json lacks slices of {name}; remove the folder to go on from an earlier one"
            )
        return value

    def _read_slice(self, rank: int, name: str, key: str, dim: int | None, start: int, stop: int) -> Tensor:
        kind, tensor = ("weights", name) if key == "weight" else ("optimizer", f"{name}.{key}")
        path = self.folder / f"{kind}_{rank:05d}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                if dim is None:
                    return file.get_tensor(tensor)
                view = file.get_slice(tensor)
                return view[start:stop] if dim == 0 else view[:, start:stop]
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); remove the folder to go on from an earlier one"
            ) from None

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Compare sizes and checksums of every `shares`-th file with the manifest.

        Raises:
            UserError: a file is missing, shortened or altered.
        """
        for number, (name, entry) in enumerate(sorted(self.manifest["files"].items())):
            path = self.folder / name
            if not path.is_file():
                raise UserError(f"{path} is missing; remove the folder to go on from an earlier one")
            if path.stat().st_size != entry["bytes"]:
                raise UserError(
                    f"{path} has not the size that it was written with; remove the folder to go on from an earlier one"
                )
            if number % shares == share and _sha256(path) != entry["sha256"]:
                raise UserError(
                    f"{path} is damaged (its checksum differs); remove the folder to go on from an earlier one"
                )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the file on the disk, not only in memory, before the folder gets its name; readable as others are."""
    publish(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def publish(path: Path) -> None:
    """Give a file the mode of any new file: safetensors makes its own readable by their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _try(action: Callable[[], None]) -> str | None:
    """The message of an OSError (safetensors' own included), or None."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None
