"""conversion_receipt.json: what was compared after a conversion, and whether all agrees.

Wrong conversions load without a word and talk nonsense: interleaved instead of half-split rotary pairs, gate and up
swapped, another epsilon or theta, padded vocabulary rows, other token ids. Each check is for some of these.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megacode
from megacode.checkpoint.convert.folder import RECEIPT
from megacode.checkpoint.convert.source import file_sha256
from megacode.errors import UserError


class ConversionError(RuntimeError):
    """What was written disagrees with its source; the message says in what."""


@dataclass(frozen=True)
class Check:
    """One check: what it measured, and what disagreed (empty: nothing)."""

    name: str
    disagreements: list[str]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hashes:
    """sha256 of one parameter's bytes on both sides."""

    source: list[str]
    """Of each piece in the source's files: one, or one for each of Meta's model-parallel files."""
    written: str
    """Of what was written, as a whole and in the arrangement in which it was written."""


@dataclass(frozen=True)
class Receipt:
    """What conversion_receipt.json holds."""

    direction: str
    agrees: bool
    step: int
    dtype: str
    checks: list[Check]
    origins: dict[str, str]
    """Where what is often guessed came from."""
    warnings: list[str]
    """What is likely wrong with the source, although both sides agree on it."""
    tensors: dict[str, Hashes]
    versions: dict[str, str]
    sha256: dict[str, str]
    """Of every file of the folder but the receipt."""


def finish(
    folder: Path,
    direction: str,
    checks: list[Check],
    tensors: dict[str, Hashes],
    *,
    step: int,
    dtype: str,
    origins: dict[str, str] | None = None,
    warnings: Iterable[str] = (),
    known: dict[str, str] | None = None,
) -> Receipt:
    """Write the receipt of `folder`.

    Args:
        known: sha256 of files that need not be read for it again.

    Raises:
        ConversionError: something disagrees. The receipt is written then as well and says the same.
        UserError: it cannot be written.
    """
    disagreements = [f"{check.name}: {found}" for check in checks for found in check.disagreements]
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECEIPT)
    files = {str(path.relative_to(folder)): path for path in paths}
    receipt = Receipt(
        direction=direction,
        agrees=not disagreements,
        step=step,
        dtype=dtype,
        checks=checks,
        origins=origins or {},
        warnings=list(warnings),
        tensors=tensors,
        versions=_versions(),
        sha256={name: (known or {}).get(name) or file_sha256(path) for name, path in files.items()},
    )
    try:
        (folder / RECEIPT).write_text(json.dumps(asdict(receipt), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {folder / RECEIPT}: {error.strerror}; make room") from None
    if disagreements:
        raise ConversionError(f"{folder} disagrees with its source: {'; '.join(disagreements)}")
    return receipt


def check_layout(
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
    rows: Iterable[tuple[str, int]],
    wanted: int,
) -> Check:
    """Names and shapes of tensors; as many rows as the tokenizer has, without padding.

    Args:
        expected, found: name -> shape.
        rows: where rows of the vocabulary are said or stand, and how many.
        wanted: how many the tokenizer has.
    """
    differences = [f"{name} is missing" for name in expected if name not in found]
    differences += [f"{name} is not of the model" for name in found if name not in expected]
    differences += [
        f"{name} is {list(found[name])} and should be {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    differences += [f"{where} has {count} rows and the tokenizer {wanted}" for where, count in rows if count != wanted]
    num_parameters = sum(math.prod(shape) for shape in found.values())
    return Check("layout", differences, {"num_parameters": num_parameters, "vocabulary_rows": wanted})


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers", "safetensors", "sentencepiece")
    return {"megacode": megacode.__version__, **{package: version(package) for package in packages}}
