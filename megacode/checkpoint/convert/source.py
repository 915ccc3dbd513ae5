"""What every source of a conversion gives: a shape, and tensors by megacode's names as pieces of the source's files."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from megacode.checkpoint.convert.weights import Progress
from megacode.errors import UserError
from megacode.model.layers import part_of
from megacode.model.llama import Llama
from megacode.recipe import ModelSection


class Source(Protocol):
    """A checkpoint of somebody else, its tensors checked against its shape.

    A parameter stands in one piece or several, in the source's own arrangement: `join` makes the parameter of them and
    `split`, its inverse, is what the receipt compares with.
    """

    kind: str
    """Whose format: "HuggingFace" or "Meta"."""
    folder: Path
    model: ModelSection
    """Vocabulary: the rows of the embedding."""
    dtype: torch.dtype
    """Of all tensors."""
    origins: dict[str, str]
    """Where what is often guessed came from: key -> words."""
    carried: list[Path]
    """Files that an export needs again, kept in the converted checkpoint's folder source/."""
    warnings: list[str]
    """What could not be looked into."""

    def verify(self, progress: Progress) -> None:
        """Compare the files with the checksums that came with them, if any did.

        Raises:
            UserError: names the file that differs.
        """
        ...

    def pieces(self, name: str) -> list[Tensor]:
        """The parameter as its files have it."""
        ...

    def places(self, name: str) -> list[tuple[Path, str]]:
        """Of each piece, the file and the name that it has there."""
        ...

    def join(self, name: str, pieces: list[Tensor]) -> Tensor:
        """The parameter as megacode has it, of its pieces."""
        ...

    def split(self, name: str, whole: Tensor) -> list[Tensor]:
        """The pieces of a parameter."""
        ...


def shapes_of(model: ModelSection) -> dict[str, tuple[int, ...]]:
    """Global name -> shape of every parameter, in the model's order."""
    with torch.device("meta"):
        return {name: part_of(parameter).shape for name, parameter in Llama(model).named_parameters()}


def warnings_of(source: Source) -> list[str]:
    """What could not be looked into, and what is likely wrong with a source, although a model can be so.

    Code Llama was trained with long contexts and a rotary base of 1,000,000 (Roziere et al. 2023, section 2.4). There
    are copies of its config.json with a long context whose base is 10,000 or left out: they compute something else.
    """
    model = source.model
    if model.max_positions <= 4096 or model.rope_theta != 10000.0:
        return source.warnings
    return [
        *source.warnings,
        f"rope_theta is 10000 with {model.max_positions} positions; Code Llama of such a context has 1000000, and "
        f"settings of one that say otherwise are wrong (--rope-theta 1000000 mends it)",
    ]


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        UserError: it is missing or holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name the folder that holds it") from None
    except ValueError:
        raise UserError(f"{path} is damaged (not JSON); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no JSON object); fetch it again")
    return content


def model_of(path: Path, **fields: Any) -> ModelSection:
    """The shape with these fields, read from the file `path`.

    Raises:
        UserError: they make no shape that megacode trains.
    """
    try:
        return ModelSection.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(word) for word in first["loc"])
        problem = f"{where} = {first['input']!r}: {first['msg']}" if where else first["msg"]
        raise UserError(
            f"{path} describes no Llama model that megacode knows ({problem}); name another folder"
        ) from None


def file_sha256(path: Path) -> str:
    """Hash of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
