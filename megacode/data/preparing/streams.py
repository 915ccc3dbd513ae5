"""The bytes of a file as chunks, unpacked where it is packed, and the lines of chunks. Nothing is ever held whole."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import zstandard

from megacode.errors import UserError

_CHUNK_BYTES = 1 << 20
_PACKED_BYTES = 1 << 14  # of Zstandard at a time: a block of 4 bytes may become one of 128 KiB
_WINDOW_BYTES = 1 << 31  # what `zstd --ultra --long=31` needs

OnBytes = Callable[[int], None]
"""Is told how many bytes of the input have been read since it was last told."""


def chunks(file: BinaryIO, name: str, on_bytes: OnBytes) -> Iterator[bytes]:
    """What a file holds, from where it stands: unpacked where `name` ends in .gz or .zst.

    Raises:
        UserError: it cannot be read, or unpacked.
    """
    try:
        if name.endswith(".gz"):
            yield from _gunzip(file, on_bytes)
        elif name.endswith(".zst"):
            yield from _unzstd(file, on_bytes)
        else:
            while data := file.read(_CHUNK_BYTES):
                on_bytes(len(data))
                yield data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file.name} is a damaged gzip file ({error}); fetch it again or leave it out") from None
    except zstandard.ZstdError as error:
        raise UserError(f"{file.name} is a damaged Zstandard file ({error}); fetch it again or leave it out") from None
    except OSError as error:
        raise UserError(f"cannot read {file.name}: {error.strerror or error}; mend it or leave it out") from None


def lines(blocks: Iterator[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines of chunks: where each begins, and its bytes without the line end.

    None stands for the bytes where they are more than `limit`. At most so many, and two chunks, are held.
    """
    start = size = 0  # of the line that has begun
    begun: list[bytes] = []
    for block in blocks:
        first, *rest = block.split(b"\n")
        for part in (first, *rest[:-1]) if rest else ():
            size += len(part)
            if begun:
                begun.append(part)
                part = b"".join(begun) if size <= limit else b""
                begun = []
            yield start, part if size <= limit else None
            start, size = start + size + 1, 0
        last = rest[-1] if rest else first
        size += len(last)
        if last:
            begun = [*begun, last] if size <= limit else [b""]  # [b""]: a line has begun, and nothing of it is kept
    if size:
        yield start, b"".join(begun) if size <= limit else None


def _gunzip(file: BinaryIO, on_bytes: OnBytes) -> Iterator[bytes]:
    before = file.tell()
    with gzip.GzipFile(fileobj=file) as unpacked:
        while data := unpacked.read(_CHUNK_BYTES):
            yield data
            before = _tell(file, before, on_bytes)
    _tell(file, before, on_bytes)


def _tell(file: BinaryIO, before: int, on_bytes: OnBytes) -> int:
    on_bytes(file.tell() - before)
    return file.tell()


def _unzstd(file: BinaryIO, on_bytes: OnBytes) -> Iterator[bytes]:
    unpacker = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
    frame = None
    while data := file.read(_PACKED_BYTES):
        on_bytes(len(data))
        while data:
            frame = frame or unpacker.decompressobj()
            yield frame.decompress(data)
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    # Not the library's own reader of streams: that one takes the end of a truncated file for the end of the data.
    if frame is not None:
        raise zstandard.ZstdError("it ends in the middle")
