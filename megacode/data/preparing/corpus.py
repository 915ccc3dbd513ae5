"""What the documents are: inputs, cut into units that can be read each by itself, one document at a time."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megacode.data.preparing.filters import Filters
from megacode.data.preparing.languages import language_of, suffixes_of
from megacode.data.preparing.readers import (
    LINES,
    PARQUET,
    PLAIN_LINES,
    Fault,
    Fields,
    Record,
    Reject,
    Segments,
    Watch,
    encodable,
    json_lines,
    parquet,
    parquet_groups,
    whole_file,
)
from megacode.data.preparing.streams import OnBytes
from megacode.errors import UserError

SUFFIXES = (".py",)
EXCLUDE = (".git", ".venv", "__pycache__", "node_modules", "site-packages", "test", "tests")
UNIT_BYTES = 64 << 20
"""About how much of the inputs one unit is, as they lie on disk; less of small inputs, so that cores end together."""
_OWN = (".bin", ".idx", ".json", ".spans", ".rejects.jsonl", ".parts", ".parts.done.tmp", ".slurm", ".lock")
"""What a preparation makes, behind its prefixes."""
_SMALL_UNIT_BYTES, _ENOUGH_UNITS = 4 << 20, 128


class Piece(NamedTuple):
    """A file, or a stretch of one: bytes start..stop-1 of JSON lines, row groups start..stop-1 of Parquet."""

    input: int
    """Which of the inputs led to it."""
    name: str
    """Path below that input."""
    size: int
    """Of the whole file, in bytes."""
    modified: int
    """Time of its last change, in ns; with the size it tells whether it is still the file that was planned with."""
    num_bytes: int
    """Of the stretch."""
    start: int | None = None
    stop: int | None = None


Unit = tuple[Piece, ...]
"""What is read, tokenized and written as one part."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        name: The file's path below its input.
        line: Number of its line, in the stretch that its unit reads (of its row in the file, for Parquet); None where
            the file is the document.
        key: What names it among all documents: the file's name, and the byte or row behind a colon.
        text: All of it.
        segments: The parts that it consists of, with whether they are to be learned; None where it is one text.
        language: By the file's name, or from the language field; None where it is not known.
        num_bytes: In UTF-8.
    """

    name: str
    line: int | None
    key: str
    text: str
    segments: Segments | None
    language: str | None
    num_bytes: int


@dataclass(frozen=True)
class Corpus:
    """The documents below some inputs, in an order that depends on nothing but their files' names.

    A file is one document; .jsonl and .ndjson (also .gz, .zst) and .parquet files have one on each line or row. Files
    are shuffled by a hash of their path below the input that led to them; lines stay in order. Nothing but the list of
    files is held in memory.

    Attributes:
        inputs: Files, or folders in which every file with one of the suffixes is taken; links in them are not.
        suffixes: Ends of file names that are taken in folders; none means those of the filters' languages, or .py.
        exclude: Names of folders below an input that are not entered.
        fields: Where a record has its text.
        filters: Which documents are left out.
    """

    inputs: Sequence[str | Path]
    suffixes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = EXCLUDE
    fields: Fields = field(default_factory=Fields)
    filters: Filters = field(default_factory=Filters)

    @property
    def source(self) -> str:
        """The inputs, in words."""
        return encodable(f"{', '.join(map(str, self.inputs))} (folders: {' '.join(self.taken)})")

    def absolute(self) -> "Corpus":
        """The same with absolute paths."""
        return dataclasses.replace(self, inputs=tuple(os.path.abspath(path) for path in self.inputs))

    @property
    def taken(self) -> tuple[str, ...]:
        """Ends of the file names that are taken in folders."""
        return self.suffixes or tuple(s for name in self.filters.languages for s in suffixes_of(name)) or SUFFIXES

    def plan(self, outputs: Sequence[str] = ()) -> Iterator[Unit]:
        """Cut the inputs into units. They depend on the files' names and sizes alone.

        Args:
            outputs: Prefixes of shards that will be written: what stands there is no input, though in a folder of them.

        Raises:
            UserError: an input is missing or of a kind that is not read, or a folder without any file to take.
        """
        unit: list[Piece] = []
        num_bytes = 0
        _refuse_doubles(self.inputs)
        files = self._files(outputs)
        most = min(UNIT_BYTES, max(_SMALL_UNIT_BYTES, sum_bytes(files) // _ENOUGH_UNITS))
        for piece in self._pieces(files, most):
            if unit and num_bytes + piece.num_bytes > most:
                yield tuple(unit)
                unit, num_bytes = [], 0
            unit.append(piece)
            num_bytes += piece.num_bytes
        if unit:
            yield tuple(unit)

    def read(self, unit: Unit, watch: Watch | None = None) -> Iterator[Document]:
        """The documents of a unit that pass the filters, in order; the others are told to `watch`.

        Raises:
            UserError: a file cannot be read, or has changed since it was planned with.
        """
        watch = watch or Watch()
        for watch.piece, piece in enumerate(unit):
            told = watch.num_lines = 0

            def on_bytes(count: int) -> None:
                nonlocal told
                told += count
                watch.on_bytes(count)

            for record in self._records(piece, watch, on_bytes):
                document = self._document(piece, record)
                if isinstance(document, Document):
                    yield document
                else:
                    watch.on_reject(document)
            watch.on_bytes(piece.num_bytes - told)

    def documents(self, watch: Watch | None = None) -> Iterator[Document]:
        """The documents of all units."""
        for unit in self.plan():
            yield from self.read(unit, watch)

    def path(self, piece: Piece) -> Path:
        """Where a piece's file is."""
        path = Path(self.inputs[piece.input])
        return path / piece.name if path.is_dir() else path

    def _files(self, outputs: Sequence[str]) -> list[Piece]:
        own = frozenset(f"{os.path.realpath(prefix)}{end}" for prefix in outputs for end in _OWN)
        files = [
            Piece(number, name, stat.st_size, stat.st_mtime_ns, stat.st_size)
            for number, path in enumerate(self.inputs)
            for name, stat in _find(Path(path), self.taken, frozenset(self.exclude), own)
        ]
        files.sort(key=lambda file: (name_hash(file.name, "order"), file.name))
        return files

    def _pieces(self, files: Sequence[Piece], most: int) -> Iterator[Piece]:
        """The files, large ones in stretches of `most` bytes."""
        for file in files:
            if file.name.endswith(PLAIN_LINES):
                for start in range(0, file.size, most):
                    stop = min(start + most, file.size)
                    yield file._replace(num_bytes=stop - start, start=start, stop=stop)
            elif file.name.endswith(PARQUET):
                yield from _row_groups(file, parquet_groups(self.path(file)), most)
            else:
                yield file

    def _records(self, piece: Piece, watch: Watch, on_bytes: OnBytes) -> Iterator[Record]:
        path = self.path(piece)
        try:
            file = path.open("rb")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; mend it or leave it out") from None
        with file:
            stat = os.fstat(file.fileno())
            if (stat.st_size, stat.st_mtime_ns) != (piece.size, piece.modified):
                raise UserError(f"{path} has changed since the start; remove PREFIX.parts and prepare again")
            if piece.name.endswith(LINES):
                yield from json_lines(file, piece.name, piece.start or 0, piece.stop, self.fields, watch, on_bytes)
            elif piece.name.endswith(PARQUET):
                yield from parquet(path, piece.start or 0, piece.stop or 0, self.fields)
            else:
                yield from whole_file(file, piece.size, self.filters.max_bytes, on_bytes)

    def _document(self, piece: Piece, record: Record) -> Document | Reject:
        line, place, content = record
        if isinstance(content, Fault):
            return Reject(piece.name, line, content.reason)
        text, segments, language = content
        if not text or text.isspace():
            return Reject(piece.name, line, "empty")
        try:
            num_bytes = len(text) if text.isascii() else len(text.encode("utf-8"))
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair
            return Reject(piece.name, line, "not Unicode")
        if line is None:
            language = language_of(piece.name)
        reason = self.filters.reason(text, language, num_bytes)
        if reason is not None:
            return Reject(piece.name, line, reason)
        key = piece.name if place is None else f"{piece.name}:{place}"
        return Document(piece.name, line, key, text, segments, language, num_bytes)


def sum_bytes(unit: Sequence[Piece]) -> int:
    """Bytes of a unit, as they lie on disk."""
    return sum(piece.num_bytes for piece in unit)


def name_hash(name: str, purpose: str) -> int:
    """64 bits that depend on a name and on what they are for."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest(), "little")


def is_valid(key: str, valid_fraction: float) -> bool:
    """Whether a document goes to the validation shard: decided by its key alone."""
    return name_hash(key, "split") < valid_fraction * 2**64


def _refuse_doubles(inputs: Sequence[str | Path]) -> None:
    """Refuse an input that is given twice, or lies in another one: its documents would count twice."""
    paths = [os.path.realpath(path) for path in inputs]
    for number, path in enumerate(paths):
        for other in paths[:number] + paths[number + 1 :]:
            if os.path.commonpath([path, other]) == other:
                what = "is given twice" if path == other else f"lies in {other}, which is given too"
                raise UserError(f"the input {inputs[number]} {what}; leave one out")


def _row_groups(file: Piece, groups: Sequence[int], most: int) -> Iterator[Piece]:
    """A Parquet file's row groups, as many in one piece as come to a unit."""
    start = num_bytes = 0
    for group, size in enumerate(groups):
        if num_bytes and num_bytes + size > most:
            yield file._replace(num_bytes=num_bytes, start=start, stop=group)
            start, num_bytes = group, 0
        num_bytes += size
    if start < len(groups):
        yield file._replace(num_bytes=num_bytes, start=start, stop=len(groups))


def _find(
    path: Path, suffixes: tuple[str, ...], exclude: frozenset[str], own: frozenset[str]
) -> Iterator[tuple[str, os.stat_result]]:
    """The files of one input: path below the input, and what the system says of it; but for those in `own`."""
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path} is no file and no folder; check the inputs")
        yield path.name, path.stat()
        return
    found, root = False, os.path.realpath(path)
    own_below = {os.path.relpath(name, root) for name in own}
    folders = [(str(path), "")]
    while folders:
        folder, below = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if below + entry.name in own_below:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name not in exclude:
                            folders.append((entry.path, f"{below}{entry.name}/"))
                    elif entry.name.endswith(suffixes) and entry.is_file(follow_symlinks=False):
                        found = True
                        yield below + entry.name, entry.stat(follow_symlinks=False)
        except OSError as error:
            raise UserError(
                f"cannot read the folder {folder}: {error.strerror}; mend it or leave it out with --exclude"
            ) from None
    if not found:
        ends = " or ".join(suffixes)
        raise UserError(f"{path} has no file that ends in {ends}; check --suffix (.jsonl is one too) and --exclude")
