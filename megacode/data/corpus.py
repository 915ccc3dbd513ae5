"""Reading source files: folders of code, single files and JSON lines, one document at a time."""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megacode.errors import UserError

SUFFIXES = (".py",)
EXCLUDE = (".git", ".venv", "__pycache__", "node_modules", "site-packages", "test", "tests")
_LINES = (".jsonl", ".jsonl.gz")
_UNREAD = (".zst", ".parquet")


@dataclass(frozen=True)
class Document:
    """A text and its name: the file's path below the input, and for JSON lines the line's number behind a colon."""

    name: str
    text: str


class Corpus:
    """The documents below some inputs, in an order that depends on nothing but their files' names.

    A file is one document; a .jsonl or .jsonl.gz file has one on each line. Files are shuffled by a hash of their path
    below the input that led to them; lines stay in order. Only the list of paths is held in memory.

    Args:
        inputs: Files, or folders in which every file with one of the suffixes is taken; links in them are not.
        suffixes: Ends of file names that are taken in folders.
        exclude: Names of folders below an input that are not entered.
        text_key: The field of a JSON line that holds the text.

    Attributes:
        source: The inputs, in words.
        num_bytes: Size of all files.
        num_bytes_read: How much of that has been read.
        num_undecodable: Documents skipped because they are not UTF-8.
        num_empty: Documents skipped because they hold nothing but white space.

    Raises:
        UserError: an input is missing, of a kind that is not read, or a folder without any file to take.
    """

    def __init__(
        self,
        inputs: Sequence[str | Path],
        *,
        suffixes: Sequence[str] = SUFFIXES,
        exclude: Sequence[str] = EXCLUDE,
        text_key: str = "text",
    ) -> None:
        files = [file for path in inputs for file in _find(Path(path), tuple(suffixes), frozenset(exclude))]
        self._files = sorted(files, key=lambda file: (name_hash(file[0], "order"), file[0]))
        self._text_key = text_key
        self.source = f"{', '.join(map(str, inputs))} (folders: {' '.join(suffixes)})"
        self.num_bytes = sum(path.stat().st_size for _, path in files)
        self.num_bytes_read = 0
        self.num_undecodable = 0
        self.num_empty = 0

    def documents(self) -> Iterator[Document]:
        """Read the documents, skipping and counting empty ones and those that are not UTF-8.

        Raises:
            UserError: a file cannot be read, or a line of a JSON lines file is not as it should be.
        """
        self.num_bytes_read = self.num_undecodable = self.num_empty = 0
        for name, path in self._files:
            documents = self._lines(name, path) if name.endswith(_LINES) else self._whole(name, path)
            try:
                for document_name, text in documents:
                    if text is None:
                        self.num_undecodable += 1
                    elif not text.strip():
                        self.num_empty += 1
                    else:
                        yield Document(document_name, text)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}; mend it or leave it out") from None
            except (EOFError, zlib.error) as error:
                raise UserError(f"{path} is a damaged gzip file ({error}); fetch it again or leave it out") from None

    def _whole(self, name: str, path: Path) -> Iterator[tuple[str, str | None]]:
        data = path.read_bytes()
        self.num_bytes_read += len(data)
        yield name, _decode(data)

    def _lines(self, name: str, path: Path) -> Iterator[tuple[str, str | None]]:
        before = self.num_bytes_read
        with path.open("rb") as raw:
            lines: IO[bytes] | gzip.GzipFile = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
            for number, line in enumerate(lines, 1):
                self.num_bytes_read = before + raw.tell()
                if line.strip():
                    yield f"{name}:{number}", self._field(line, f"{path}:{number}")

    def _field(self, line: bytes, where: str) -> str | None:
        """The text of a JSON line; None where it is not UTF-8 (JSON can also spell half a surrogate pair)."""
        decoded = _decode(line)
        if decoded is None:
            return None
        try:
            record = json.loads(decoded)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}); mend the line or leave the file out") from None
        text = record.get(self._text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{where} has no text in the field {self._text_key!r}; name the field with --text-key")
        return _decode(text.encode("utf-8", "surrogatepass"))


def name_hash(name: str, purpose: str) -> int:
    """64 bits that depend on a name and on what they are for."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8, person=purpose.encode())
    return int.from_bytes(digest.digest(), "little")


def _decode(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _find(path: Path, suffixes: tuple[str, ...], exclude: frozenset[str]) -> Iterator[tuple[str, Path]]:
    """The files of one input: path below the input, and path."""
    if not path.is_dir():
        yield path.name, _readable(path)
        return
    found = False
    for folder, folders, names in os.walk(path, onerror=_refuse):
        folders[:] = [name for name in folders if name not in exclude]
        for name in names:
            file = Path(folder, name)
            if name.endswith(suffixes) and file.is_file() and not file.is_symlink():
                found = True
                yield file.relative_to(path).as_posix(), _readable(file)
    if not found:
        raise UserError(f"{path} has no file that ends in {' or '.join(suffixes)}; check --suffix and --exclude")


def _readable(path: Path) -> Path:
    if path.name.endswith(_UNREAD):
        raise UserError(f"{path}: Zstandard and Parquet are not read yet; turn it into .jsonl or .jsonl.gz")
    if not path.is_file():
        raise UserError(f"{path} is no file and no folder; check the inputs")
    return path


def _refuse(error: OSError) -> None:
    raise UserError(
        f"cannot read the folder {error.filename}: {error.strerror}; mend it or leave it out with --exclude"
    )
