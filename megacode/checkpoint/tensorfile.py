"""Safetensors files written tensor by tensor: memory for the tensor at hand, and the hash made on the way.

The format (safetensors' README): 8 bytes, little-endian, the length of the header; the header, JSON of name -> dtype,
shape and offsets, filled up with spaces to a multiple of 8; the tensors' bytes without gaps. safetensors itself wants
all tensors of a file in memory, and its torch binding copies them once more.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_HASHED_BYTES = 8 * 2**20
"""Written and hashed in such pieces, at the same time: whoever comes second finds a piece in the cache."""


class TensorFile:
    """Writes one file; leaving it without an error syncs it to the disk, and every tensor must have been written.

    Args:
        path: the file; it must not exist. Where something fails, an incomplete file keeps this name: make it in a
            folder that gets its own name later.
        tensors: name -> dtype and shape, in the order in which they will be written.
        metadata: strings kept in the header.

    Attributes:
        num_bytes: of the finished file.
        sha256: of the finished file, hexadecimal.

    Raises:
        OSError: it can't be written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.num_bytes, self.sha256 = path, 0, ""
        self._declared = dict(tensors)
        self._left = iter(self._declared)
        self._hash, self._hasher = hashlib.sha256(), ThreadPoolExecutor(1, "hash")
        self._file: FileIO = path.open("xb", buffering=0)
        try:
            self._write(memoryview(_header(self._declared, {"format": "pt", **(metadata or {})})))
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._release()
        else:
            self.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor; it must be on the host, and have the name, dtype and shape that were declared."""
        expected = next(self._left, None)
        assert name == expected, f"{name} is written where {expected} was declared"
        declared = self._declared[name]
        assert (tensor.dtype, tuple(tensor.shape)) == declared, f"{name}: {tensor.dtype} {tuple(tensor.shape)}"
        self._write(bytes_of(tensor))

    def close(self) -> None:
        """Have the file on the disk and not only in memory."""
        try:
            left = next(self._left, None)
            assert left is None, f"{left} was declared and is not written"
            os.fsync(self._file.fileno())
        finally:
            self._release()
        self.sha256 = self._hash.hexdigest()

    def _release(self) -> None:
        self._hasher.shutdown()
        self._file.close()

    def _write(self, data: memoryview) -> None:
        for start in range(0, len(data), _HASHED_BYTES):
            piece = data[start : start + _HASHED_BYTES]
            hashed = self._hasher.submit(self._hash.update, piece)
            while len(piece):  # a raw file may take a part, before a disk is full
                written = self._file.write(piece)
                assert written is not None
                self.num_bytes += written
                piece = piece[written:]
            hashed.result()


def read_tensor(path: Path, name: str, rows: range | None = None) -> Tensor:
    """A tensor of a safetensors file, or some of its rows.

    Raises:
        OSError: the file can't be read, or is shorter than it says.
        KeyError: it has no such tensor.
        ValueError: its header is no JSON, or it has fewer rows.
    """
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        dtype = next(dtype for dtype, known in NAMES.items() if known == entry["dtype"])
        (start, stop), shape = entry["data_offsets"], entry["shape"]
        if rows is not None:
            if rows.stop > shape[0]:
                raise ValueError(f"{name} has {shape[0]} rows")
            start += (stop - start) // shape[0] * rows.start
            shape = [len(rows), *shape[1:]]
        return read_at(file, 8 + length + start, dtype, shape)


def read_at(file: FileIO, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The contiguous tensor whose bytes begin at `offset` of a file that is open unbuffered.

    Read and not mapped: the page faults of a mapping cost more than the copy, and its pages count as memory.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype)
    left = bytes_of(tensor)
    file.seek(offset)
    while len(left):
        count = file.readinto(left)
        if not count:
            raise OSError(f"{len(left)} bytes of a tensor are missing at the end")
        left = left[count:]
    return tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host, as they stand in a file; no copy where it is contiguous."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)


def sha256(tensor: Tensor) -> str:
    """Hash of a tensor's bytes, hexadecimal."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def _header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
