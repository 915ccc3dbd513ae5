"""Reading of checkpoints: a manifest of global names, shapes and slices, and safetensors files of parts.

Whoever reads asks for a parameter, or a part of it, by its global name; which files hold it, in what slices, is the
manifest's affair. Nothing here runs a pickle.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacode.checkpoint.earlier import is_of_a_run, mend
from megacode.checkpoint.tensorfile import read_tensor
from megacode.errors import UserError
from megacode.model.layers import Slice
from megacode.recipe import ModelSection

FORMAT = 1
STATES = ("exp_avg", "exp_avg_sq")
"""What the optimizer keeps of each parameter, fp32."""
OPTIMIZER = "adamw"
"""Whose states these are."""
SEAL = "sha256"
"""Key of the manifest for the checksum of all the others; before it there was none."""
_READ_BYTES = 8 * 2**20
_KEYS = {"tensors": {"shape", "dim", "slices"}, "files": {"bytes", "sha256"}}
"""What each entry of a section of the manifest has."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    begun_from: str | None = None
    """The checkpoint whose weights the run began from; None: at random."""


def global_order(name: str) -> tuple[int, int, str]:
    """Sorts names of parameters as the model has them: embedding, layers by number, last norm, head."""
    words = name.split(".")
    if "layers" in words:
        return 1, int(words[words.index("layers") + 1]), name
    return (0 if "embed_tokens" in name else 2 if "norm" in name else 3), 0, name


def _other(folder: Path) -> str:
    """The mend for a folder that is none, by what it looks like."""
    if (folder / "checkpoints").is_dir():
        return f"name one of {folder}/checkpoints/step_*"
    for name, word in (("config.json", "from-hf"), ("params.json", "from-meta")):
        if (folder / name).is_file():
            return f"megacode convert {word} {folder} FOLDER makes one of it"
    return mend(folder) if is_of_a_run(folder) else "name a step_* folder of a run, or a converted one"


class CheckpointReader:
    """A finished checkpoint, read tensor by tensor.

    Attributes:
        names: global names in the model's order.
        model: the model's shape, vocabulary filled in.
        progress: where the run stood.
        precision: "bf16" or "fp32", the run's arithmetic; of weights that were converted, their own.
        dtype: as which the weights are stored: fp32 (the masters of a run), or what they were converted from.
        optimizer: whose states are there; None: weights alone.

    Raises:
        UserError: the folder holds no checkpoint, a damaged manifest, or one of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{folder} holds no checkpoint (manifest.json: {error.strerror}); {_other(self.folder)}"
            ) from None
        except ValueError:
            raise UserError(f"{path} is damaged (not JSON); {mend(self.folder)}") from None
        if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
            raise UserError(f"{path} has format {manifest['format']}, this megacode reads {FORMAT}")
        if isinstance(manifest, dict) and SEAL in manifest and manifest[SEAL] != _digest(manifest):
            raise UserError(f"{path} is damaged (its checksum differs); {mend(self.folder)}")
        try:
            self._take(manifest)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")
            raise UserError(f"{path} is damaged ({reason}); {mend(self.folder)}") from None

    def _take(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        for section, keys in _KEYS.items():
            for name, entry in manifest[section].items():
                if lacking := keys - entry.keys():
                    raise KeyError(f"{min(lacking)} of {name}")
        self.names: list[str] = list(manifest["tensors"])
        self.model = ModelSection.model_validate(manifest["model"])
        self.progress = Progress(**manifest["progress"])
        self.precision: str = manifest["precision"]
        self.dtype = DTYPES[manifest.get("dtype", "fp32")]
        self.optimizer: str | None = manifest.get("optimizer", OPTIMIZER)

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

    def read_stored(self, name: str) -> Tensor:
        """The whole parameter in the type that it is stored as, bit by bit."""
        return self._read(name, Slice(self.shape(name), 1.0), "weight")

    def read_part(self, name: str, part: Slice, key: str = "weight", rows: range | None = None) -> Tensor:
        """The part that a rank of any layout holds, or some rows of it, fp32: nothing else is read."""
        return self._read(name, part, key, rows).float()

    def _read(self, name: str, part: Slice, key: str, rows: range | None = None) -> Tensor:
        entry = self.manifest["tensors"][name]
        shape, dim = entry["shape"], entry["dim"]
        assert tuple(shape) == part.shape, f"{name}: {shape} in the checkpoint, {part.shape} in the model"
        wanted = [range(size) for size in shape]
        if part.dim is not None:
            wanted[part.dim] = range(part.start, part.stop)
        if rows is not None:
            wanted[0] = wanted[0][rows.start : rows.stop]
        slices = entry["slices"][:1] if dim is None else sorted(entry["slices"], key=lambda piece: piece["start"])
        pieces = []
        for piece in slices:
            there = [range(size) for size in shape]
            if dim is not None:
                there[dim] = range(piece["start"], piece["stop"])
            common = [_common(*pair) for pair in zip(wanted, there, strict=True)]
            if all(common):
                pieces.append(self._read_slice(piece["rank"], name, key, common, there))
        value = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim or 0) if pieces else torch.empty(0)
        if list(value.shape) != [len(each) for each in wanted]:
            raise UserError(f"{self.folder}/manifest.json lacks slices of {name}; {mend(self.folder)}")
        return value

    def _read_slice(self, rank: int, name: str, key: str, wanted: list[range], there: list[range]) -> Tensor:
        """What is wanted of the slice that a rank wrote; both in the whole parameter, a range for each dimension."""
        kind, tensor = ("weights", name) if key == "weight" else ("optimizer", f"{name}.{key}")
        path = self.folder / f"{kind}_{rank:05d}.safetensors"
        inside = [range(a.start - b.start, a.stop - b.start) for a, b in zip(wanted, there, strict=True)]
        try:
            if wanted[1:] == there[1:]:
                return read_tensor(path, tensor, inside[0])
            with safe_open(path, framework="pt") as file:
                return file.get_slice(tensor)[tuple(slice(each.start, each.stop) for each in inside)]
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); {mend(self.folder)}") from None

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Compare sizes and checksums of every `shares`-th file with the manifest.

        Raises:
            UserError: a file is missing, shortened or altered.
        """
        for problem in self.damage(share, shares):
            raise UserError(f"{problem}; {mend(self.folder)}")

    def damage(
        self, share: int | None = 0, shares: int = 1, advance: Callable[[int], None] = lambda count: None
    ) -> Iterator[str]:
        """What is wrong with the files, one after the other; of every `shares`-th file the checksum too.

        Args:
            share, shares: which files are hashed here; None: none, which is quick.
            advance: told of bytes that have been hashed.
        """
        files: dict[str, Any] = self.manifest["files"]
        kinds = ("weights", "optimizer") if self.optimizer else ("weights",)
        ranks = {piece["rank"] for entry in self.manifest["tensors"].values() for piece in entry["slices"]}
        needed = [f"{kind}_{rank:05d}.safetensors" for kind in kinds for rank in sorted(ranks)]
        yield from (f"{self.folder}/manifest.json names no {name}" for name in needed if name not in files)
        for number, (name, entry) in enumerate(sorted(files.items())):
            path = self.folder / name
            try:
                if not path.is_file():
                    yield f"{path} is missing"
                elif path.stat().st_size != entry["bytes"]:
                    yield f"{path} has not the size that it was written with"
                elif number % shares == share and _sha256(path, advance) != entry["sha256"]:
                    yield f"{path} is damaged (its checksum differs)"
            except OSError as error:
                yield f"{path} cannot be read ({error.strerror})"


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with a checksum of itself."""
    return {**manifest, SEAL: _digest(manifest)}


def _digest(manifest: dict[str, Any]) -> str:
    values = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _common(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _sha256(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
            advance(len(data))
    return digest.hexdigest()
