"""Token shards: PREFIX.bin and .idx, byte for byte Megatron's MMIDIDX, and PREFIX.json for what they have no room for.

PREFIX.idx, little-endian: magic (9 bytes), version u64, dtype code u8, sequences u64, length of the document index u64,
then tokens per sequence (int32), byte offset of each sequence in PREFIX.bin (int64), and the document index (int64: the
number of the first sequence of each document, and at the end the number of sequences). Here one document is one
sequence. PREFIX.bin is the tokens alone. Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

import bisect
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, length of the document index
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_BLOCK = 1 << 20  # documents, or tokens, that are looked at in one piece

IntArray = NDArray[np.integer[Any]]


class ShardWriter:
    """Writes one shard, a document at a time. Its files appear when the `with` block ends, unless by an exception.

    Args:
        prefix: Where: PREFIX.bin, PREFIX.idx, PREFIX.json. A shard that stands there is replaced.
        vocabulary: Rows of the tokenizer; below 65,500 (Megatron's bound) a token takes two bytes, else four.
        tokenizer_sha256: Goes to PREFIX.json, so that a run can tell a foreign tokenizer.
        source: What the documents are, in words; goes to PREFIX.json.
    """

    def __init__(self, prefix: str | Path, vocabulary: int, *, tokenizer_sha256: str = "", source: str = "") -> None:
        self.prefix = Path(prefix)
        self.vocabulary = vocabulary
        self.num_documents = 0
        self.num_tokens = 0
        self._facts = {"tokenizer_sha256": tokenizer_sha256, "vocabulary": vocabulary, "source": source}
        self._code = 8 if vocabulary < 65500 else 4
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> "ShardWriter":
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = self._temporary("bin").open("wb")
        # The lengths wait on disk, so that memory does not grow with the corpus.
        self._lengths = self._temporary("lengths").open("w+b")
        return self

    def add_document(self, ids: Sequence[int] | IntArray) -> None:
        """Append a document, framing pieces included. Its ids must be rows of the vocabulary."""
        array = np.asarray(ids)
        assert array.ndim == 1
        assert array.size > 0, "an empty document has no place in a shard"
        assert 0 <= int(array.min()) <= int(array.max()) < self.vocabulary
        data = array.astype(_little(self._code)).tobytes()
        self._bin.write(data)
        self._sha256.update(data)
        self._lengths.write(struct.pack("<i", array.size))
        self.num_documents += 1
        self.num_tokens += array.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._bin.close()
            self._lengths.close()
            for part in ("bin", "idx", "json", "lengths"):
                self._temporary(part).unlink(missing_ok=True)

    def _temporary(self, part: str) -> Path:
        return Path(f"{self.prefix}.{part}.{os.getpid()}.tmp")

    def _finish(self) -> None:
        self._bin.close()
        self._lengths.flush()
        with self._temporary("idx").open("wb") as idx:
            self._write_index(idx)
        facts = {
            **self._facts,
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "bin_sha256": self._sha256.hexdigest(),
        }
        self._temporary("json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        # Without its .idx a shard does not exist: taking the old one away first and putting the new one last, no crash
        # can leave a mixture of two shards that opens.
        _path(self.prefix, "idx").unlink(missing_ok=True)
        for part in ("bin", "json", "idx"):
            os.replace(self._temporary(part), _path(self.prefix, part))

    def _write_index(self, idx: BinaryIO) -> None:
        idx.write(HEADER.pack(MAGIC, 1, self._code, self.num_documents, self.num_documents + 1))
        for sizes in self._blocks_of_sizes():
            idx.write(sizes.tobytes())
        offset = 0
        for sizes in self._blocks_of_sizes():
            sizes_bytes = sizes.astype("<i8") * _little(self._code).itemsize
            ends = offset + np.cumsum(sizes_bytes)
            idx.write((ends - sizes_bytes).astype("<i8").tobytes())
            offset = int(ends[-1])
        for start in range(0, self.num_documents + 1, _BLOCK):
            idx.write(np.arange(start, min(start + _BLOCK, self.num_documents + 1), dtype="<i8").tobytes())

    def _blocks_of_sizes(self) -> Iterator[IntArray]:
        self._lengths.seek(0)
        while block := self._lengths.read(4 * _BLOCK):
            yield np.frombuffer(block, "<i4")


class Shards:
    """One shard, memory-mapped. Opening reads the header and the last entries only, however many documents there are.

    Files written by Megatron-LM, which have no PREFIX.json, open too.

    Attributes:
        prefix: As given.
        num_documents, num_tokens: Counts.
        lengths: Tokens of each document: [num_documents].
        tokenizer_sha256, vocabulary: Of the tokenizer that made the shard; None where there is no PREFIX.json.
        bin_sha256: Of PREFIX.bin when it was written; None where there is no PREFIX.json.

    Raises:
        UserError: a file is missing, truncated, of another format, or does not fit the other one.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self._idx_path, self._bin_path = _path(self.prefix, "idx"), _path(self.prefix, "bin")
        code, self.num_documents = self._read_header()
        count = self.num_documents
        # [num_documents], [num_documents], [num_documents + 1]; unaligned, as Megatron lays them
        self.lengths = _map(self._idx_path, "<i4", HEADER.size, count)
        self._offsets_bytes = _map(self._idx_path, "<i8", HEADER.size + 4 * count, count)
        self._document_index = _map(self._idx_path, "<i8", HEADER.size + 12 * count, count + 1)
        self._dtype = _little(code)
        self.num_tokens = self._count_tokens()
        self._tokens = _map(self._bin_path, self._dtype.str, 0, self.num_tokens)  # [num_tokens]
        self._facts = self._read_facts()
        self.tokenizer_sha256: str | None = self._facts.get("tokenizer_sha256") or None
        self.vocabulary: int | None = self._facts.get("vocabulary")
        self.bin_sha256: str | None = self._facts.get("bin_sha256")

    def document(self, index: int) -> IntArray:
        """Ids of a document, framing included: [tokens]."""
        start = self.document_start(index)
        return self._tokens[start : start + int(self.lengths[index])]

    def tokens(self, start: int, stop: int) -> IntArray:
        """Ids start..stop-1 of all documents laid end to end: [stop - start]."""
        assert 0 <= start <= stop <= self.num_tokens
        return self._tokens[start:stop]

    def document_start(self, index: int) -> int:
        """Where a document starts in the concatenation; for index num_documents, where the last one ends."""
        if index == self.num_documents:
            return self.num_tokens
        return int(self._offsets_bytes[index]) // self._dtype.itemsize

    def document_starts(self, first: int, stop: int) -> NDArray[np.int64]:
        """Where documents first..stop-1 start in the concatenation: [stop - first]."""
        return self._offsets_bytes[first:stop].astype(np.int64) // self._dtype.itemsize

    def document_at(self, token: int) -> int:
        """The document that holds a token of the concatenation."""
        assert 0 <= token < self.num_tokens
        # Not np.searchsorted: on an unaligned array it copies the whole array first.
        return bisect.bisect_right(range(self.num_documents), token, key=self.document_start) - 1

    def verify(self) -> None:
        """Read everything: the index must be consistent, the tokens those that were written.

        Raises:
            UserError: a file is damaged.
        """
        offset = 0
        for start in range(0, self.num_documents, _BLOCK):
            sizes_bytes = self.lengths[start : start + _BLOCK].astype(np.int64) * self._dtype.itemsize
            ends = offset + np.cumsum(sizes_bytes)
            numbers = np.arange(start, start + len(ends))
            if (
                sizes_bytes.min() < 0
                or not np.array_equal(self._offsets_bytes[start : start + _BLOCK], ends - sizes_bytes)
                or not np.array_equal(self._document_index[start : start + len(ends)], numbers)
            ):
                raise UserError(f"{self._idx_path} is damaged: its entries do not follow each other; prepare it again")
            offset = int(ends[-1])
        if not self._facts:
            return
        with self._bin_path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self._facts["bin_sha256"]:
            raise UserError(
                f"{self._bin_path} is damaged: its checksum is not that of {self.prefix}.json; prepare it again"
            )

    def _read_header(self) -> tuple[int, int]:
        """Dtype code and number of documents, after checking what the header and the file's size can tell."""
        path = self._idx_path
        data = _read(path, HEADER.size)
        if len(data) < HEADER.size or not data.startswith(MAGIC):
            raise UserError(
                f"{path} is no MMIDIDX file; make it with `megacode prepare` or Megatron's preprocess_data.py"
            )
        _, version, code, sequences, boundaries = HEADER.unpack(data)
        if version != 1 or code not in DTYPES:
            raise UserError(
                f"{path} has version {version} and dtype code {code}; this reads version 1 and integer codes"
            )
        if boundaries != sequences + 1:
            raise UserError(
                f"{path} has {boundaries - 1} documents in {sequences} sequences; prepare one sequence a document"
            )
        expected_bytes = HEADER.size + 20 * sequences + 8
        if path.stat().st_size != expected_bytes:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes where its header promises {expected_bytes}: "
                "it is truncated or multimodal; prepare it again"
            )
        return code, sequences

    def _count_tokens(self) -> int:
        """Tokens that the index promises, after checking that the .bin holds as many."""
        end_bytes = 0
        if self.num_documents:
            end_bytes = int(self._offsets_bytes[-1]) + int(self.lengths[-1]) * self._dtype.itemsize
        _read(self._bin_path, 0)
        if self._bin_path.stat().st_size != end_bytes:
            raise UserError(
                f"{self._bin_path} has {self._bin_path.stat().st_size} bytes where its .idx promises {end_bytes}: "
                "it is truncated or belongs to another .idx; prepare it again"
            )
        return end_bytes // self._dtype.itemsize

    def _read_facts(self) -> dict[str, Any]:
        path = _path(self.prefix, "json")
        if not path.exists():
            return {}
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            counts = facts["num_documents"], facts["num_tokens"]
            facts["bin_sha256"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} cannot be understood; prepare the shard again") from None
        if counts != (self.num_documents, self.num_tokens):
            raise UserError(f"{path} counts other documents or tokens than {self._idx_path}; prepare the shard again")
        return facts


def _little(code: int) -> np.dtype:
    return np.dtype(DTYPES[code]).newbyteorder("<")


def _path(prefix: Path, part: str) -> Path:
    return Path(f"{prefix}.{part}")  # not with_suffix: a prefix may hold dots


def _map(path: Path, dtype: str, offset_bytes: int, count: int) -> IntArray:
    if count == 0:  # numpy refuses to map nothing
        return np.empty(0, dtype)
    # As a plain array: slicing a memmap takes several times as long.
    return np.asarray(np.memmap(path, dtype, "r", offset_bytes, (count,)))


def _read(path: Path, num_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; name the prefix that PREFIX.bin and .idx share"
        ) from None
