"""Tensors of files as the library of the format reads them: what a receipt compares with.

A conversion reads by `stored`, which works out itself where a tensor lies; nothing of that is used here. A file is
opened for every tensor anew, since pages of a mapping count as memory until it is closed.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacode.errors import UserError


def read_by_library(path: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, or of one that torch.save wrote; no pickled code is run.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        content: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return content[name]
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def files_by_name(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Name of a tensor -> the files that hold it, in their order.

    Raises:
        UserError: a file cannot be read.
    """
    found: dict[str, list[Path]] = {}
    for path in paths:
        for name in _names(path):
            found.setdefault(name, []).append(path)
    return found


def _names(path: Path) -> list[str]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        return list(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return UserError(f"{path} cannot be read ({reason}); see that it stays, or fetch it again")
