"""Files of tensors that others wrote: safetensors, and PyTorch's own, of which no pickled code is ever run.

A tensor that is read lies in the file's mapping: of a file, memory holds what is in use and no more. The mapping goes
with the last tensor in it, so each read makes a new one: pages of a mapping that stays would add up to the file.
"""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacode.checkpoint.reader import DTYPES
from megacode.errors import UserError

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
        """A tensor, in the file's own type, read-only."""
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
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)


class TorchFile:
    """What torch.save wrote of a dictionary of tensors; see `StoredFile`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        tensors = self._map()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes: dict[str, torch.dtype | str] = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._map()[name].contiguous()

    def _map(self) -> dict[str, Tensor]:
        try:
            content = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{self.path} holds more than tensors and is not read, since reading could run its code "
                f"({_line(error)}); take a safetensors file"
            ) from None
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, OSError) and error.strerror:
                raise UserError(f"cannot read {self.path}: {error.strerror}") from None
            raise UserError(
                f"{self.path} is truncated, damaged or of a PyTorch before 1.6 ({_line(error)}); fetch it again, or "
                f"save it again with a newer PyTorch"
            ) from None
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise UserError(f"{self.path} is no dictionary of tensors; name a folder of weights alone")
        return content


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
    wanted = _type(known or "bf16, fp16 or fp32")
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
    return str(dtype).removeprefix("torch.")
