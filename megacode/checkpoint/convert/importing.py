"""From a checkpoint of somebody else to one of megacode: a folder that `checkpoint.start_from` takes."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megacode.checkpoint.convert.folder import CARRIED, written_beside
from megacode.checkpoint.convert.grown import Grown, NewRows
from megacode.checkpoint.convert.source import Source, shapes_of
from megacode.checkpoint.convert.stored import dtype_name
from megacode.checkpoint.convert.weights import MAX_FILE_BYTES, WrittenFile, num_bytes, write_weights
from megacode.checkpoint.convert.weights import Progress as Report
from megacode.checkpoint.reader import FORMAT, Progress, sealed
from megacode.data import durable
from megacode.data.tokenizer import Tokenizer, with_infilling
from megacode.errors import UserError
from megacode.recipe import ModelSection


def with_tokenizer(source: Source, tokenizer: Path | None, new_rows: NewRows | None) -> tuple[Source, bytes]:
    """The source with as many rows as its tokenizer has, and the tokenizer's file.

    Args:
        source: what is converted.
        tokenizer: its SentencePiece model; left out, tokenizer.model beside its files.
        new_rows: how to make rows for infilling pieces, which are appended to the tokenizer; None: append none.

    Raises:
        UserError: the tokenizer is missing, or has other rows than the source; or infilling pieces are there already.
    """
    path = tokenizer or source.folder / "tokenizer.model"
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the model's SentencePiece file in it with --tokenizer")
    if not path.is_file():
        raise UserError(f"{path} is missing; name the model's SentencePiece file with --tokenizer")
    rows, pieces = source.model.vocabulary, Tokenizer(path)
    if rows != pieces.vocabulary:
        raise UserError(
            f"{source.folder} has {rows} rows of the vocabulary and {path} {pieces.vocabulary}; name the tokenizer "
            f"that the model was trained with (--tokenizer). Rows of padding are cut off by who added them "
            f"(transformers: model.resize_token_embeddings({pieces.vocabulary}))"
        )
    if new_rows is None:
        return source, path.read_bytes()
    if pieces.has_infilling:
        raise UserError(f"{path} has infilling pieces already; leave --add-infilling out")
    return Grown(source, new_rows), with_infilling(path)


def convert(
    source: Source,
    tokenizer: bytes,
    folder: Path,
    *,
    check: Callable[[Path], None],
    force: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Report = lambda done, total: None,
    verifying: Report = lambda done, total: None,
) -> None:
    """Write `folder`: the weights in the source's own type, the tokenizer, and what an export needs of the source.

    Args:
        source, tokenizer: what `with_tokenizer` gives.
        folder: the target; missing, or empty, or with `force` an earlier conversion.
        check: called with the written folder before it gets its name; what it raises leaves the folder under its
            temporary name.
        force: replace an earlier conversion.
        max_file_bytes: largest file of weights, unless one parameter alone is larger.
        progress: called with bytes written and bytes to write.
        verifying: called before that with bytes compared with the source's own checksums, and bytes to compare.

    Raises:
        UserError: the target is taken, or lies in the source or around it, the disk too small or not writable, or
            a file of the source damaged or not what its checksum says.
    """
    shapes = shapes_of(source.model)

    def read(name: str) -> Tensor:
        return source.join(name, source.pieces(name))

    needed_bytes = num_bytes(shapes, source.dtype)
    with written_beside(folder, source=source.folder, force=force, needed_bytes=needed_bytes, check=check) as written:
        source.verify(verifying)
        files = write_weights(
            written, shapes, source.dtype, read, _file_name, max_file_bytes=max_file_bytes, progress=progress
        )
        (written / "tokenizer.model").write_bytes(tokenizer)
        (written / CARRIED).mkdir()
        for path in source.carried:
            shutil.copyfile(path, written / CARRIED / path.name)
        text = json.dumps(sealed(_manifest(source, shapes, files)), indent=1)
        (written / "manifest.json").write_text(text, encoding="utf-8")
        durable.sync(*(written / CARRIED).iterdir(), written / CARRIED)


def recipe_lines(model: ModelSection, folder: Path) -> str:
    """The sections of a recipe, in YAML, that start a training from converted weights.

    The rotary base and the context are there even where the recipe's defaults are the same: a training with another
    base starts as well, since a new stage may have one.

    Args:
        model: the shape that was converted, with its rows.
        folder: where it stands.
    """
    always = {"rope_theta", "max_positions"}
    fields = type(model).model_fields
    values = model.model_dump(mode="json")
    shape = {key: value for key, value in values.items() if key in always or value != fields[key].default}
    sections = {
        "model": shape,
        "tokenizer": {"path": str(folder / "tokenizer.model")},
        "checkpoint": {"start_from": str(folder)},
    }
    return yaml.safe_dump(sections, default_flow_style=None, sort_keys=False, allow_unicode=True, width=math.inf)


def _file_name(number: int, total: int) -> str:
    return f"weights_{number:05d}.safetensors"


def _manifest(source: Source, shapes: dict[str, tuple[int, ...]], files: list[WrittenFile]) -> dict[str, Any]:
    numbers = {name: number for number, file in enumerate(files) for name in file.tensors}
    return {
        "format": FORMAT,
        "progress": asdict(Progress(0, 0, 0, seed=0, sequence_length=0, num_tokens=0)),
        "model": source.model.model_dump(mode="json"),
        "precision": "fp32" if source.dtype == torch.float32 else "bf16",
        "dtype": dtype_name(source.dtype),
        "optimizer": None,
        "source": {"format": source.kind, "origins": source.origins},
        "files": {file.name: {"bytes": file.num_bytes, "sha256": file.sha256} for file in files},
        "tensors": {
            name: {"shape": list(shape), "dim": None, "slices": [{"rank": numbers[name], "start": 0, "stop": 0}]}
            for name, shape in shapes.items()
        },
    }
