"""Weights into safetensors files of a bounded size: one tensor is written, and the next one read meanwhile."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacode.checkpoint.tensorfile import TensorFile

MAX_FILE_BYTES = 5_000_000_000
"""As transformers' own files."""

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


@dataclass(frozen=True)
class WrittenFile:
    """A file of weights."""

    name: str
    tensors: list[str]
    num_bytes: int
    sha256: str


def plan_files(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, max_file_bytes: int = MAX_FILE_BYTES
) -> list[list[str]]:
    """Names of the tensors of each file: in their order, a file is closed when the next would not fit."""
    files: list[list[str]] = [[]]
    filled_bytes = 0
    for name, shape in shapes.items():
        size_bytes = math.prod(shape) * dtype.itemsize
        if files[-1] and filled_bytes + size_bytes > max_file_bytes:
            files.append([])
            filled_bytes = 0
        files[-1].append(name)
        filled_bytes += size_bytes
    return files


def num_bytes(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Of all tensors."""
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


def write_weights(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    file_name: Callable[[int, int], str],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Progress = lambda done, total: None,
) -> list[WrittenFile]:
    """Write every tensor, in the order of `shapes`.

    Args:
        folder: where to.
        shapes: name -> shape.
        dtype: of all of them.
        read: gives a tensor by its name; it is asked once for each, in a thread.
        file_name: (number from 0 on, how many) -> name of a file.
        max_file_bytes: largest file, unless one tensor alone is larger.
        progress: called with bytes written and bytes to write.

    Raises:
        OSError: it can't be written.
    """
    planned = plan_files(shapes, dtype, max_file_bytes)
    written = []
    done_bytes, total_bytes = 0, num_bytes(shapes, dtype)
    tensors = _read_ahead(read, list(shapes))
    for number, names in enumerate(planned):
        path = folder / file_name(number, len(planned))
        with TensorFile(path, {name: (dtype, shapes[name]) for name in names}) as file:
            for name in names:
                tensor = next(tensors)
                file.write(name, tensor)
                done_bytes += tensor.nbytes
                progress(done_bytes, total_bytes)
        written.append(WrittenFile(path.name, names, file.num_bytes, file.sha256))
    return written


def _read_ahead(read: Callable[[str], Tensor], names: Sequence[str]) -> Iterator[Tensor]:
    with ThreadPoolExecutor(1, "read") as pool:
        coming = pool.submit(read, names[0])
        for following in names[1:]:
            tensor = coming.result()
            coming = pool.submit(read, following)
            yield tensor
        yield coming.result()
