"""Which documents hold text of a benchmark: a run of 10 words is enough, as for Qwen2.5-Coder and DeepSeek-Coder."""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from megacode.data.preparing.readers import LINES
from megacode.data.preparing.words import Hashes, ngram_hashes, split, word_hashes
from megacode.errors import UserError

NGRAM = 10
"""Words of a run that tells a benchmark's text."""
SHORTEST = 3
"""A text of fewer words than a run, but at least so many, is looked for as a whole; a shorter one cannot be."""
SHORTEST_PART = 5
"""The same of a text that is but part of a problem: return x + y is the whole solution of one, and in 1 % of files."""
SOLUTIONS = ("canonical_solution", "solution", "code")
TESTS = ("test", "tests", "test_list", "challenge_test_list")
FIELDS = ("prompt", "text", "question", "problem", "instruction", "description", *SOLUTIONS, "answer", *TESTS)
"""Fields of a benchmark's record that are its text, in this order (HumanEval and MBPP, and what resembles them)."""
_NAMES = r"[\w.]+(?:[ \t]+as[ \t]+\w+)?"
_IMPORT = re.compile(  # and no prose that begins a line with one of these words
    rf"^[ \t]*(?:from[ \t]+[\w.]+[ \t]+import\b.*|import[ \t]+{_NAMES}(?:[ \t]*,[ \t]*{_NAMES})*[ \t]*(?:[#;].*)?)$",
    re.MULTILINE,
)
_DOCSTRING = re.compile(r'("""|\'\'\').*?\1', re.DOTALL)


class Index:
    """Runs of words of benchmarks.

    Attributes:
        names: The benchmarks.
        num_skipped: Problems that nothing can be found by: of fewer than 3 words, or of little but numbers.
    """

    def __init__(self, names: Sequence[str], grams: dict[int, tuple[Hashes, Hashes]], num_skipped: int = 0) -> None:
        self.names = list(names)
        self.num_skipped = num_skipped
        self._grams = grams

    @classmethod
    def build(cls, files: Sequence[str | Path]) -> "Index":
        """Read benchmarks.

        Args:
            files: .jsonl or .ndjson (also .gz, .zst) or .parquet (a problem a record), or any other UTF-8 text but
                .json (one text as a whole).

        Raises:
            UserError: a file cannot be read, has no text in a known field, or two have the same name.
        """
        names = [Path(file).name for file in files]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two --decontaminate files are named {name}; rename one, rejects tell them by name")
        found: dict[int, dict[int, int]] = {}
        num_skipped = 0
        for number, file in enumerate(files):
            num_problems = 0
            for whole, *parts in _problems(Path(file)):
                num_problems += 1
                runs = [_runs(whole, SHORTEST), *(_runs(part, SHORTEST_PART) for part in parts)]
                num_skipped += not any(hashes.size for _, hashes in runs)
                for length, hashes in runs:
                    for value in hashes.tolist():
                        found.setdefault(length, {}).setdefault(value, number)
            if not num_problems:
                raise UserError(f"{file} holds no text to look for; check --decontaminate")
        return cls(names, {length: _sorted(found[length]) for length in sorted(found)}, num_skipped)

    def save(self, path: str | Path) -> None:
        """Write the index; `load` reads it."""
        arrays = {f"{kind}{n}": a for n, pair in self._grams.items() for kind, a in zip("hb", pair, strict=True)}
        path = Path(path)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, names=np.array(self.names), skipped=self.num_skipped, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Index":
        with np.load(path, allow_pickle=False) as file:
            lengths = sorted(int(key[1:]) for key in file.files if key[0] == "h")
            grams = {n: (file[f"h{n}"], file[f"b{n}"]) for n in lengths}
            return cls(file["names"].tolist(), grams, int(file["skipped"]))

    def find(self, text: str) -> tuple[str, str] | None:
        """The first run of a document that stands in a benchmark too: the benchmark's name and the words."""
        words = word_hashes(text)
        for length, (hashes, benchmarks) in self._grams.items():
            runs = ngram_hashes(words, length)
            places = np.searchsorted(hashes, runs)
            hits = np.flatnonzero(hashes[np.minimum(places, len(hashes) - 1)] == runs)
            if hits.size:
                first = int(hits[0])
                name = self.names[int(benchmarks[places[first]])]
                return name, " ".join(split(text)[first : first + length])
        return None


def sha256(file: str | Path) -> str:
    """What a benchmark file is known by. Raises: UserError where it cannot be read."""
    try:
        with Path(file).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}; check --decontaminate") from None


def _runs(text: str, shortest: int) -> tuple[int, Hashes]:
    """Length of a text's runs, and their hashes; length 0 where the text is too short to be found by.

    A run of which half or more are numbers tells nothing: 0 1 2 3 ... 9 stands in 1 % of all Python files, and in tests
    of HumanEval. Nor does one of which half or more are lines of imports.
    """
    told = _words_that_tell(text)
    if len(told) < shortest:
        return 0, np.empty(0, np.uint64)
    length = min(NGRAM, len(told))
    hashes = ngram_hashes(word_hashes(text), length)
    sums = np.cumsum([0, *told])
    return length, hashes[2 * (sums[length:] - sums[:-length]) > length]


def _words_that_tell(text: str) -> list[bool]:
    """For each word of a text whether it is neither a number nor of an import."""
    lines = text.replace("\r", "\n")
    told: list[bool] = []
    place = 0
    for found in _IMPORT.finditer(lines):
        told += [not word[0].isdecimal() for word in split(lines[place : found.start()])]
        told += [False] * len(split(found.group()))
        place = found.end()
    return told + [not word[0].isdecimal() for word in split(lines[place:])]


def _sorted(found: dict[int, int]) -> tuple[Hashes, Hashes]:
    hashes = np.array(sorted(found), np.uint64)
    return hashes, np.array([found[value] for value in hashes.tolist()], np.uint64)


def _problems(file: Path) -> Iterator[list[str]]:
    """The problems of a benchmark file, each in the forms in which it is looked for."""
    try:
        if file.name.endswith(LINES):
            for number, record in _json_records(file):
                yield _forms(record, f"{file}:{number}")
        elif file.name.endswith(".parquet"):
            for number, record in enumerate(_parquet_records(file), 1):
                yield _forms(record, f"{file}, row {number}")
        elif file.name.endswith(".json"):
            raise UserError(f"{file} would be one text as a whole; name JSON lines .jsonl, and a text .txt")
        elif text := file.read_text(encoding="utf-8").strip():
            yield [text]
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8; mend it or leave out --decontaminate {file}") from None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"cannot read {file}: {error}; check --decontaminate") from None


def _json_records(file: Path) -> Iterator[tuple[int, Any]]:
    opener: Any = {".gz": gzip.open, ".zst": zstandard.open}.get(file.suffix, open)
    with opener(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise UserError(f"{file}:{number} is not JSON ({error}); mend the line") from None


def _parquet_records(file: Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file} needs pyarrow; install it: pip install -c constraints.txt -e '.[data]'") from None
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(columns=[name for name in opened.schema_arrow.names if name in FIELDS]):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} is not Parquet as it should be ({error}); fetch it again") from None


def _forms(record: Any, where: str) -> list[str]:
    """All of a problem's text; its function without docstrings; its solutions and tests, each by itself.

    Only where one of the latter is shorter than a run, or joins what a docstring parts, is it more than the first. A
    short question or answer in prose is anybody's.
    """
    given = [name for name in FIELDS if record.get(name)] if isinstance(record, dict) else []
    lists = {name: record[name] if isinstance(record[name], list) else [record[name]] for name in given}
    if not lists or not all(isinstance(text, str) for texts in lists.values() for text in texts):
        raise UserError(f"{where} has no text in any of the fields {', '.join(FIELDS)}; rename the benchmark's fields")
    texts = {name: "\n".join(values) for name, values in lists.items()}
    solutions = [texts[name] for name in SOLUTIONS if name in texts]
    function = [_DOCSTRING.sub("", "\n".join([texts["prompt"], *solutions]))] if "prompt" in texts and solutions else []
    return ["\n".join(texts.values()), *function, *solutions, *(texts[name] for name in TESTS if name in texts)]
