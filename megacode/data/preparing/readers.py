"""The records of a file: whole files, JSON lines (plain, .gz, .zst) and Parquet, one at a time.

What is wrong with a record is a `Fault`, and reading goes on; what is wrong with a file is a UserError.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from megacode.data.preparing.filters import MAX_DOCUMENT_BYTES
from megacode.data.preparing.streams import OnBytes, chunks, lines
from megacode.errors import UserError

PLAIN_LINES = (".jsonl", ".ndjson")
LINES = tuple(kind + packed for kind in PLAIN_LINES for packed in ("", ".gz", ".zst"))
PARQUET = ".parquet"
MAX_LINE_BYTES = MAX_DOCUMENT_BYTES
_BATCH_ROWS = 64
_CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Segments = tuple[tuple[str, bool], ...]
"""Parts of a document: text, and whether it is to be learned."""


@dataclass(frozen=True)
class Fields:
    """Which fields of a JSON line, or columns of a Parquet file, hold the text and its language."""

    text: str = "text"
    language: str | None = None


class Content(NamedTuple):
    """What a record holds."""

    text: str
    segments: Segments | None = None
    language: str | None = None


class Fault(Exception):  # noqa: N818 (it is what is wrong with one record)
    """Why a record is no document, in a few words that are the same for all of their kind."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


def encodable(text: str) -> str:
    """A text that UTF-8 can hold: half surrogate pairs, as names of files may have them, are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class Record(NamedTuple):
    """A record of a file.

    `line` is its number, from 1, in the stretch that is read (in the file, for Parquet); `place` is the byte where it
    begins, or for Parquet its row. Both are None where a file is one record.
    """

    line: int | None
    place: int | None
    content: Content | Fault


@dataclass(frozen=True)
class Reject:
    """A document that is left out, and why: `Fault.reason`, or the filter's, or the list's that drops it; and of what
    holds text of a benchmark, the words that were found."""

    name: str
    line: int | None
    reason: str
    found: str | None = None


@dataclass
class Watch:
    """What reading tells besides documents."""

    on_bytes: OnBytes = lambda count: None
    on_reject: Callable[[Reject], None] = lambda reject: None
    piece: int = 0
    """Which of the unit's pieces is being read."""
    num_lines: int = 0
    """Lines that have begun in it."""


def whole_file(file: BinaryIO, size: int, max_bytes: int, on_bytes: OnBytes) -> Iterator[Record]:
    """A file that is one document."""
    if size > max_bytes:
        yield Record(None, None, Fault("too large"))
        return
    data = b"".join(chunks(file, "", on_bytes))
    try:
        yield Record(None, None, Content(data.decode("utf-8")))
    except UnicodeDecodeError:
        yield Record(None, None, Fault("not UTF-8"))


def json_lines(
    file: BinaryIO, name: str, start: int, stop: int | None, fields: Fields, watch: Watch, on_bytes: OnBytes
) -> Iterator[Record]:
    """The lines that begin in bytes start..stop-1 of a JSON lines file, or, for stop None, all of a packed one's."""
    if start and not _seek_line(file, start, stop or 0):
        return
    begin = 0 if stop is None else file.tell()
    for number, (offset, line) in enumerate(lines(chunks(file, name, on_bytes), MAX_LINE_BYTES), 1):
        place = begin + offset
        if stop is not None and place >= stop:
            return
        watch.num_lines = number
        if line is None:
            yield Record(number, place, Fault("too large"))
            continue
        if place == 0:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if line and not line.isspace():
            try:
                yield Record(number, place, _of_line(line, fields))
            except Fault as fault:
                yield Record(number, place, fault)


def parquet(path: Path, first_group: int, stop_group: int, fields: Fields) -> Iterator[Record]:
    """The rows of some row groups, read page by page."""
    names = [name for name in (fields.text, fields.language) if name is not None]
    with _parquet_file(path) as file:
        for name in names:
            if name not in file.schema_arrow.names:
                option = "--text-field" if name == fields.text else "--language-field"
                raise UserError(f"{path} has no column {name!r}; name another with {option}")
        row = sum(file.metadata.row_group(group).num_rows for group in range(first_group))
        groups = list(range(first_group, stop_group))
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=names, use_threads=False):
            for text, language in zip(_column(batch, fields.text), _column(batch, fields.language), strict=True):
                try:
                    content: Content | Fault = _content(text(), language(), fields)
                except Fault as fault:
                    content = fault
                yield Record(row + 1, row, content)
                row += 1


def parquet_groups(path: Path) -> list[int]:
    """Bytes of each row group of a Parquet file, unpacked.

    Raises:
        UserError: it is none, or pyarrow is missing.
    """
    with _parquet_file(path) as file:
        # Not the sizes of columns: asked for those, pyarrow 26 ends the process on some damaged files.
        return [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install 'megacode[data]'") from None
    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK_BYTES) as file:
            yield file
    except UserError:
        raise
    except (ArrowException, OSError, ValueError) as error:  # ValueError: names that are no UTF-8, and the like
        said = " ".join(str(error).split())
        raise UserError(f"cannot read {path} as Parquet: {said}; fetch it again or leave it out") from None


def _seek_line(file: BinaryIO, start: int, stop: int) -> bool:
    """Go to the first line that begins in bytes start..stop-1; False where there is none. Reads no further."""
    file.seek(start - 1)
    while (place := file.tell()) < stop and (data := file.read(_CHUNK_BYTES)):
        if (found := data.find(b"\n")) >= 0:
            file.seek(place + found + 1)
            return place + found + 1 < stop
    return False


def _of_line(line: bytes, fields: Fields) -> Content:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _second_try(line)
    if not isinstance(record, dict):
        raise Fault("no JSON object")
    return _content(record.get(fields.text), record.get(fields.language), fields)


def _second_try(line: bytes) -> Any:
    """What Python's own reader makes of a line that orjson refuses: it knows NaN and half surrogate pairs."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise Fault("not UTF-8") from None
    except (ValueError, RecursionError):
        raise Fault("not JSON") from None


def _content(value: Any, language: Any, fields: Fields) -> Content:
    if value is None:
        raise Fault(f"no field {fields.text!r}")
    segments = None if isinstance(value, str) else _segments(value, fields)
    text = value if segments is None else "".join(part for part, _ in segments)
    return Content(text, segments, language.lower() if _is_name(language) else None)


def _is_name(language: Any) -> bool:
    """Whether a language can be written down: JSON can spell half a surrogate pair."""
    return isinstance(language, str) and encodable(language) == language


def _segments(value: Any, fields: Fields) -> Segments:
    parts = value if isinstance(value, list) else [None]
    segments: list[tuple[str, bool]] = []
    for part in parts:
        text, loss = (part.get("text"), part.get("loss")) if isinstance(part, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(loss, bool):
            raise Fault(f"the field {fields.text!r} is neither text nor a list of segments")
        segments.append((text, loss))
    if not any(loss for _, loss in segments):
        raise Fault("no segment is to be learned")
    return tuple(segments)


def _column(batch: Any, name: str | None) -> list[Any]:
    """For each row of a batch, what gives its value of a column. Strings are decoded here: they may be no UTF-8."""
    import pyarrow

    if name is None:
        return [lambda: None] * batch.num_rows
    column = batch.column(name)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        large = pyarrow.types.is_large_string(column.type)
        column = column.cast(pyarrow.large_binary() if large else pyarrow.binary())
    return [lambda scalar=scalar: _value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        value = scalar.as_py()
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        raise Fault("not UTF-8") from None
