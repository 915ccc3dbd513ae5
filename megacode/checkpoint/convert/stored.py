"""Files of tensors that others wrote: safetensors, and PyTorch's own, of which no pickled code is ever run.

Of a file, memory holds the tensors that are in use and no more.
"""

import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacode.checkpoint.reader import DTYPES
from megacode.checkpoint.tensorfile import bytes_of, read_at, read_tensor
from megacode.errors import UserError

_SUMMED_BYTES = 16 * 2**20
_SAFETENSORS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    """The name in `DTYPES`."""
    return next(name for name, known in DTYPES.items() if known == dtype)


class StoredFile(Protocol):
    """A file of tensors."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    """Name -> shape, in the order of the file."""
    dtypes: dict[str, torch.dtype | str]
    """Name -> type; one that is not known here by the name that the file has for it."""

    def read(self, name: str) -> Tensor:
        """A tensor, in the file's own type."""
        ...


def open_stored(path: Path) -> StoredFile:
    """A file of tensors, by its suffix: .safetensors, or one of PyTorch's.

    Raises:
        UserError: it is missing, truncated, damaged, or would run code.
    """
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


class SafetensorsFile:
    """A safetensors file; see `StoredFile`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no dict)
                    view = file.get_slice(name)
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = _SAFETENSORS.get(view.get_dtype(), view.get_dtype())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({_line(error)}); fetch the file again") from None

    def read(self, name: str) -> Tensor:
        try:
            return read_tensor(self.path, name)
        except OSError as error:
            raise _unreadable(self.path, error) from None


class TorchFile:
    """What torch.save wrote of a dictionary of tensors; see `StoredFile`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors, self._sums = _describe(path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes: dict[str, torch.dtype | str] = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        described = self._tensors[name]
        # torch.load notes where each storage lies in the file, for tensors that it makes without data.
        storage: Any = described.untyped_storage()
        offset: int = storage._checkpoint_offset + int(described.storage_offset()) * described.itemsize
        span = 1 + sum((size - 1) * stride for size, stride in zip(described.shape, described.stride(), strict=True))
        try:
            with self.path.open("rb", buffering=0) as file:
                tensor = read_at(file, offset, described.dtype, (span,))
                whole = tensor if tensor.nbytes == storage.nbytes() else None
                expected = self._sums[storage._checkpoint_offset]
                if expected and _crc32(file, storage._checkpoint_offset, storage.nbytes(), whole) != expected:
                    raise UserError(f"{name} in {self.path} is damaged (its CRC-32 differs); fetch the file again")
        except OSError as error:
            raise _unreadable(self.path, error) from None
        return tensor.as_strided(described.shape, described.stride(), 0).contiguous()


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror or error}); see that it stays, or fetch it again")


def _crc32(file: FileIO, offset: int, num_bytes: int, content: Tensor | None) -> int:
    """Of a record of a file, whose `content` may be in memory already."""
    if content is not None:
        return zlib.crc32(bytes_of(content))
    value, stop = 0, offset + num_bytes
    for start in range(offset, stop, _SUMMED_BYTES):
        piece = read_at(file, start, torch.uint8, (min(_SUMMED_BYTES, stop - start),))
        value = zlib.crc32(bytes_of(piece), value)
    return value


def _describe(path: Path) -> tuple[dict[str, Tensor], dict[int, int]]:
    """The tensors of a file without their data; and of each record where its content begins -> its CRC-32.

    torch.save writes 0 where it is told to compute none.

    Raises:
        UserError: see `open_stored`.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no archive, or a part of one")
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            sums = _sums(path, archive)
        content = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and is not read, since reading could run its code "
            f"({_line(error)}); take a safetensors file"
        ) from None
    except (OSError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        raise UserError(
            f"{path} is truncated, damaged or of a PyTorch before 1.6 ({_line(error)}); fetch it again, or "
            f"save it again with a newer PyTorch"
        ) from None
    if compressed:
        raise UserError(
            f"{path} is compressed, so that its tensors cannot be read one at a time; read it with torch.load and "
            f"write it with torch.save"
        )
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} is no dictionary of tensors; name a folder of weights alone")
    return content, sums


def _sums(path: Path, archive: zipfile.ZipFile) -> dict[int, int]:
    found = {}
    with path.open("rb") as file:
        for entry in archive.infolist():
            file.seek(entry.header_offset + 26)  # of 30 bytes before two fields of these lengths
            lengths = file.read(4)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", lengths))
            found[start] = entry.CRC
    return found


def _line(error: Exception) -> str:
    """The first sentence of an error that may be a page long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + "..."


Found = dict[str, tuple[Path, tuple[int, ...], torch.dtype | str]]
"""Name of a tensor -> file, shape, type."""


def check_tensors(found: Found, expected: dict[str, tuple[int, ...]]) -> torch.dtype:
    """Refuse tensors that are missing, surplus, of another shape, or not all of one type that is known here.

    Args:
        found: what files hold.
        expected: name -> shape of the model.

    Returns:
        Their one type.

    Raises:
        UserError: names the first tensor of each kind, and its file.
    """
    both = {name: found[name] for name in expected if name in found}
    known = next((dtype for _, _, dtype in both.values() if dtype in DTYPES.values()), None)
    wanted = _type(known) if known else "bf16, fp16 or fp32"
    problems = [
        *_first(f"{name} is missing" for name in expected if name not in found),
        *_first(f"{name} in {found[name][0].name} is not of the model" for name in found if name not in expected),
        *_first(
            f"{name} in {path.name} has the shape {list(shape)} instead of {list(expected[name])}"
            for name, (path, shape, _) in both.items()
            if shape != expected[name]
        ),
        *_first(
            f"{name} in {path.name} is {_type(dtype)} instead of {wanted}"
            for name, (path, _, dtype) in both.items()
            if dtype != known
        ),
    ]
    if problems:
        raise UserError(f"{'; '.join(problems)}: fetch the files again, or name a folder of a whole Llama model")
    assert isinstance(known, torch.dtype)
    return known


def _first(all_problems: Iterable[str]) -> list[str]:
    """The first of them, and how many more there are."""
    problems = list(all_problems)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return [problems[0] + more] if problems else []


def _type(dtype: torch.dtype | str) -> str:
    """One name of a type, whatever the format calls it: fp64 for torch.float64 and for F64 of safetensors."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype_name(dtype)
    kinds = {"float": "fp", "f": "fp", "i": "int", "u": "uint"}
    name = str(dtype).removeprefix("torch.").lower()
    return re.sub(r"^(float|f|i|u)(?=\d)", lambda found: kinds[found[1]], name)
