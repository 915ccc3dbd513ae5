"""Token shards: PREFIX.bin and .idx, byte for byte Megatron's MMIDIDX, and PREFIX.json for what they have no room for.

PREFIX.idx, little-endian: magic (9 bytes), version u64, dtype code u8, sequences u64, length of the document index u64,
then tokens per sequence (int32), byte offset of each sequence in PREFIX.bin (int64), and the document index (int64: the
number of the first sequence of each document, and at the end the number of sequences). Here one document is one
sequence. PREFIX.bin is the tokens alone. Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py.

PREFIX.json: `tokenizer_sha256`, `vocabulary`, `source`, `num_documents`, `num_tokens`, `bin_sha256` (the shard's
identity: sha256 of the hex digests of `checksums`, one behind the other), `checksums` (bytes and sha256 of each of the
consecutive stretches that make up PREFIX.bin, 64 MiB at most), `num_spans` and `spans_sha256` of PREFIX.spans where
there are loss spans, and what the writer was told besides.
"""

import bisect
import contextlib
import functools
import hashlib
import json
import mmap
import os
import resource
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import orjson
from numpy.typing import NDArray

from megacode.data.durable import rename, sync
from megacode.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, length of the document index
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
STRETCH_BYTES = 64 << 20
"""The most that one checksum covers."""
_BLOCK = 1 << 20  # documents, or tokens, that are looked at in one piece
_MOST_FILES = 1 << 16

IntArray = NDArray[np.integer[Any]]


class ShardWriter:
    """Writes one shard, a document at a time. Its files appear when the `with` block ends, unless by an exception.

    Args:
        prefix: Where: PREFIX.bin, PREFIX.idx, PREFIX.json. A shard that stands there is replaced.
        vocabulary: Rows of the tokenizer; below 65,500 (Megatron's bound) a token takes two bytes, else four.
        tokenizer_sha256: Goes to PREFIX.json, so that a run can tell a foreign tokenizer.
        source: What the documents are, in words; goes to PREFIX.json.

    Attributes:
        facts: What goes to PREFIX.json besides counts and checksums; more may be put in.
    """

    def __init__(self, prefix: str | Path, vocabulary: int, *, tokenizer_sha256: str = "", source: str = "") -> None:
        self.prefix = Path(prefix)
        self.vocabulary = vocabulary
        self.num_documents = 0
        self.num_tokens = 0
        self.facts: dict[str, Any] = {
            "tokenizer_sha256": tokenizer_sha256,
            "vocabulary": vocabulary,
            "source": source,
        }
        self._code = 8 if vocabulary < 65500 else 4
        self._dtype = _little(self._code)
        self._checksums: list[tuple[int, str]] = []
        self._sha256, self._stretch_bytes = hashlib.sha256(), 0
        self._finished = False

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
        data = array.astype(self._dtype).data.cast("B")
        self._bin.write(data)
        for start in range(0, len(data), STRETCH_BYTES):
            self._checksum(data[start : start + STRETCH_BYTES])
        self._lengths.write(struct.pack("<i", array.size))
        self.num_documents += 1
        self.num_tokens += array.size

    def add_shard(self, prefix: str | Path) -> "Shards":
        """Append all documents of another shard of the same vocabulary, with its checksums; its tokens aren't read."""
        shards = Shards(prefix)
        assert shards.vocabulary == self.vocabulary
        self._close_stretch()
        self._bin.flush()
        with _path(shards.prefix, "bin").open("rb") as source:
            _copy(source, self._bin, shards.num_tokens * self._dtype.itemsize)
        for start in range(0, shards.num_documents, _BLOCK):
            self._lengths.write(shards.lengths[start : start + _BLOCK].tobytes())
        self._checksums += shards.checksums
        self.num_documents += shards.num_documents
        self.num_tokens += shards.num_tokens
        return shards

    def finish(self) -> None:
        """Write everything, under temporary names. Where several files must appear together, each is finished first."""
        self._close_stretch()
        self._bin.close()
        self._lengths.flush()
        with self._temporary("idx").open("wb") as idx:
            self._write_index(idx)
        digests = "".join(digest for _, digest in self._checksums)
        self.facts |= {
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            "bin_sha256": hashlib.sha256(digests.encode()).hexdigest(),
            "checksums": self._checksums,
        }
        self._temporary("json").write_bytes(_json(self.facts))
        self._finished = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if not self._finished:
                    self.finish()
                self._publish()
        finally:
            for file in (self._bin, self._lengths):
                with contextlib.suppress(OSError):  # what is lost here was given up already
                    file.close()
            for part in ("bin", "idx", "json", "lengths"):
                self._temporary(part).unlink(missing_ok=True)

    def withdraw(self) -> None:
        """Take away the shard that stands there: without its .idx it does not exist."""
        _path(self.prefix, "idx").unlink(missing_ok=True)

    def _publish(self) -> None:
        # The old .idx goes first and the new one comes last: no crash, nor power loss, can leave a mixture of two
        # shards that opens.
        self.withdraw()
        sync(self.prefix.parent)
        for part in ("bin", "json", "idx"):
            rename(self._temporary(part), _path(self.prefix, part))

    def _checksum(self, data: memoryview) -> None:
        if self._stretch_bytes + len(data) > STRETCH_BYTES:
            self._close_stretch()
        self._sha256.update(data)
        self._stretch_bytes += len(data)

    def _close_stretch(self) -> None:
        if self._stretch_bytes:
            self._checksums.append((self._stretch_bytes, self._sha256.hexdigest()))
            self._sha256, self._stretch_bytes = hashlib.sha256(), 0

    def _temporary(self, part: str) -> Path:
        return Path(f"{self.prefix}.{part}.{os.getpid()}.tmp")

    def _write_index(self, idx: BinaryIO) -> None:
        idx.write(HEADER.pack(MAGIC, 1, self._code, self.num_documents, self.num_documents + 1))
        for sizes in self._blocks_of_sizes():
            idx.write(sizes.tobytes())
        offset = 0
        for sizes in self._blocks_of_sizes():
            sizes_bytes = sizes.astype("<i8") * self._dtype.itemsize
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

    Files written by Megatron-LM, which have no PREFIX.json, open too. The index is mapped when something of it is first
    read, as the file of spans is (`Spans`): if one of these is cut short while it is open, the process ends by SIGBUS.
    Put new files in place by renaming, as `ShardWriter` does. PREFIX.bin is read and not mapped: cut short, it is an
    error. What a damaged index says is never followed out of PREFIX.bin.

    Attributes:
        prefix: As given.
        num_documents, num_tokens: Counts.
        itemsize: Bytes of a token.
        facts: What PREFIX.json says; empty where there is none.
        tokenizer_sha256, vocabulary: Of the tokenizer that made the shard; None where there is no PREFIX.json.
        bin_sha256: The shard's identity; None where there is no PREFIX.json.
        checksums: Bytes and sha256 of each stretch of PREFIX.bin; none where there is no PREFIX.json.

    Raises:
        UserError: a file is missing, truncated, of another format, or does not fit the other one; or, from any method,
            damaged where that shows only then.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self._idx_path, self._bin_path = _path(self.prefix, "idx"), _path(self.prefix, "bin")
        with _opened(self._idx_path) as idx:
            code, self.num_documents = self._read_header(idx)
            self._dtype = _little(code)
            self.itemsize = self._dtype.itemsize
            self.num_tokens = self._count_tokens(idx)
        self.facts = self._read_facts()
        self.tokenizer_sha256: str | None = self.facts.get("tokenizer_sha256") or None
        self.vocabulary: int | None = self.facts.get("vocabulary")
        self.bin_sha256: str | None = self.facts.get("bin_sha256")
        self.checksums: list[tuple[int, str]] = [(size, digest) for size, digest in self.facts.get("checksums", [])]

    def __reduce__(self) -> tuple[type["Shards"], tuple[Path]]:
        """Processes that are given a shard open it again."""
        return Shards, (self.prefix,)

    def document(self, index: int) -> IntArray:
        """Ids of a document, framing included: [tokens]."""
        assert 0 <= index < self.num_documents
        start, size = self.document_start(index), int(self.lengths[index])
        self._check_size(index, start, size)
        return self._read(start, start + size)

    def document_part(self, index: int, start: int, stop: int) -> IntArray:
        """Ids start..stop-1 of a document: [stop - start]."""
        assert 0 <= start <= stop <= int(self.lengths[index])
        place = self.document_start(index)
        self._check_size(index, place, stop)
        return self._read(place + start, place + stop)

    def tokens(self, start: int, stop: int) -> IntArray:
        """Ids start..stop-1 of all documents laid end to end: [stop - start]."""
        assert 0 <= start <= stop <= self.num_tokens
        return self._read(start, stop)

    def _read(self, start: int, stop: int) -> IntArray:
        """Tokens by a read of its own and not through the map, which would fault page by page, fetch megabytes around
        each fault, and end the process if the file is cut short meanwhile."""
        file, num_bytes, place = self._bin_file, (stop - start) * self.itemsize, start * self.itemsize
        data = _pread(file, num_bytes, place)
        while len(data) < num_bytes:  # Linux reads 2 GiB at most
            more = _pread(file, num_bytes - len(data), place + len(data))
            if not more:
                raise UserError(f"{self._bin_path} has become shorter since it was opened; prepare it again")
            data += more
        return np.frombuffer(data, self._dtype)

    def _check_size(self, index: int, start: int, size: int) -> None:
        if not 0 <= size <= self.num_tokens - start:
            raise self._damaged(HEADER.size + 4 * index, f"document {index} has {size} tokens")

    def document_start(self, index: int) -> int:
        """Where a document starts in the concatenation; for index num_documents, where the last one ends."""
        assert 0 <= index <= self.num_documents
        if index == self.num_documents:
            return self.num_tokens
        start, rest = divmod(int(self._offsets_bytes[index]), self.itemsize)
        if rest or not 0 <= start <= self.num_tokens:
            raise self._damaged(self._offset_place(index), f"document {index} does not begin in the .bin")
        return start

    def document_starts(self, first: int, stop: int) -> NDArray[np.int64]:
        """Where documents first..stop-1 start in the concatenation: [stop - first]."""
        assert 0 <= first <= stop <= self.num_documents
        starts, rests = np.divmod(self._offsets_bytes[first:stop], self.itemsize)
        wrong = (rests != 0) | (starts < 0) | (starts > self.num_tokens)
        if wrong.any():
            self.document_start(first + int(wrong.argmax()))
        return starts

    def document_at(self, token: int) -> int:
        """The document that holds a token of the concatenation."""
        assert 0 <= token < self.num_tokens
        # Not np.searchsorted: on an unaligned array it copies the whole array first.
        found = bisect.bisect_right(range(self.num_documents), token, key=self.document_start) - 1
        if found < 0 or not self.document_start(found) <= token < self.document_start(found + 1):
            raise self._damaged(self._offset_place(max(found, 0)), f"no document holds token {token}")
        return found

    def verify(self, vocabulary: int | None = None, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        """Read everything: the index must be consistent, ids rows of the vocabulary, tokens those that were written.

        Args:
            vocabulary: Rows of the tokenizer, for files without PREFIX.json.
            on_bytes: Told how many bytes have been looked at since it was last told.

        Raises:
            UserError: a file is damaged; it names the first byte that is wrong, or the stretch that it lies in.
        """
        self._verify_index(on_bytes)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            stop = threading.Event()

            def check(stretch: tuple[int, int, str]) -> int:
                return self._verify_stretch(*stretch, self.vocabulary or vocabulary, stop)

            try:
                for num_bytes in pool.map(check, self._stretches()):
                    on_bytes(num_bytes)
            finally:
                stop.set()  # a mistake is told at once, not when all stretches behind it are read

    def _verify_index(self, on_bytes: Callable[[int], None]) -> None:
        offset = 0
        for start in range(0, self.num_documents, _BLOCK):
            stop = min(start + _BLOCK, self.num_documents)
            sizes_bytes = self.lengths[start:stop].astype(np.int64) * self.itemsize
            self._compare(sizes_bytes, np.maximum(sizes_bytes, 0), HEADER.size + 4 * start, 4, "a negative length")
            ends = offset + np.cumsum(sizes_bytes)
            found = self._offsets_bytes[start:stop]
            self._compare(
                found, ends - sizes_bytes, self._offset_place(start), 8, "an offset that is not the sum of the lengths"
            )
            offset = int(ends[-1])
            on_bytes(12 * len(ends))
        for start in range(0, self.num_documents + 1, _BLOCK):
            found = self._document_index[start : start + _BLOCK]
            place = HEADER.size + 12 * self.num_documents + 8 * start
            self._compare(found, np.arange(start, start + len(found)), place, 8, "a wrong entry in the document index")
            on_bytes(8 * len(found))

    def _verify_stretch(
        self, place: int, num_bytes: int, digest: str, vocabulary: int | None, stop: threading.Event
    ) -> int:
        """Check ids and checksum of a stretch of PREFIX.bin."""
        sha256, block_bytes = hashlib.sha256(), _BLOCK * self.itemsize
        for start in range(place, place + num_bytes, block_bytes):
            if stop.is_set():
                break
            ids = self._read(start // self.itemsize, min(start + block_bytes, place + num_bytes) // self.itemsize)
            sha256.update(ids.data)
            self._verify_ids(ids, start, vocabulary)
        else:
            if digest and sha256.hexdigest() != digest:
                raise UserError(
                    f"{self._bin_path} is damaged: bytes {place} to {place + num_bytes - 1} have another checksum than "
                    f"{self.prefix}.json says; prepare it again"
                )
        return num_bytes

    def _verify_ids(self, block: IntArray, place: int, vocabulary: int | None) -> None:
        highest = np.iinfo(self._dtype).max if vocabulary is None else vocabulary - 1
        if int(block.min()) < 0 or int(block.max()) > highest:
            first = int(((block < 0) | (block > highest)).argmax())
            byte = place + first * self.itemsize
            raise UserError(
                f"{self._bin_path} is damaged: byte {byte} begins id {int(block[first])}, which is no row of the "
                f"vocabulary of {vocabulary}; prepare it again"
            )

    def _compare(self, found: IntArray, expected: IntArray, place: int, size: int, what: str) -> None:
        """Raise for the first entry that differs, by its first byte that does."""
        if not np.array_equal(found, expected):
            first = int((found != expected).argmax())
            raise self._damaged(place + size * first, what)

    def _damaged(self, byte: int, what: str) -> UserError:
        return UserError(f"{self._idx_path} is damaged at byte {byte}: {what}; prepare it again")

    def _offset_place(self, index: int) -> int:
        """The byte of the index where a document's offset stands."""
        return HEADER.size + 4 * self.num_documents + 8 * index

    def _stretches(self) -> Iterator[tuple[int, int, str]]:
        """Where each stretch of PREFIX.bin begins, its bytes, and its checksum, empty where there is none."""
        total, place = self.num_tokens * self.itemsize, 0
        whole, rest = divmod(total, STRETCH_BYTES)
        unknown = [(STRETCH_BYTES, "")] * whole + [(rest, "")] * (rest > 0)
        for num_bytes, digest in self.checksums or unknown:
            yield place, num_bytes, digest
            place += num_bytes

    # [num_documents], [num_documents], [num_documents + 1]; unaligned, as Megatron lays them
    @functools.cached_property
    def lengths(self) -> IntArray:
        """Tokens of each document, as the index has them: int32 [num_documents]."""
        return self._index("<i4", HEADER.size, self.num_documents)

    @functools.cached_property
    def _offsets_bytes(self) -> IntArray:
        return self._index("<i8", self._offset_place(0), self.num_documents)

    @functools.cached_property
    def _document_index(self) -> IntArray:
        return self._index("<i8", HEADER.size + 12 * self.num_documents, self.num_documents + 1)

    def _index(self, dtype: str, place: int, count: int) -> IntArray:
        return np.frombuffer(self._idx_map, dtype, count, place)

    @functools.cached_property
    def _idx_map(self) -> mmap.mmap:
        return _map(self._idx_path, HEADER.size + 20 * self.num_documents + 8)

    @functools.cached_property
    def _bin_file(self) -> BinaryIO:
        file = _opened(self._bin_path)
        weakref.finalize(self, file.close)
        return file

    def _read_header(self, idx: BinaryIO) -> tuple[int, int]:
        """Dtype code and number of documents, after checking what the header and the file's size can tell."""
        path, data = self._idx_path, idx.read(HEADER.size)
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
        found_bytes, expected_bytes = os.fstat(idx.fileno()).st_size, HEADER.size + 20 * sequences + 8
        if found_bytes != expected_bytes:
            raise UserError(
                f"{path} has {found_bytes} bytes where its header promises {expected_bytes}: "
                "it is truncated or multimodal; prepare it again"
            )
        return code, sequences

    def _count_tokens(self, idx: BinaryIO) -> int:
        """Tokens that the index promises, after checking that the .bin holds as many."""
        end_bytes = 0
        if self.num_documents:
            idx.seek(HEADER.size + 4 * (self.num_documents - 1))
            (size,) = struct.unpack("<i", idx.read(4))
            idx.seek(self._offset_place(self.num_documents - 1))
            (offset,) = struct.unpack("<q", idx.read(8))
            end_bytes = offset + size * self.itemsize
        with _opened(self._bin_path) as file:
            found_bytes = os.fstat(file.fileno()).st_size
        if found_bytes != end_bytes or end_bytes % self.itemsize:
            raise UserError(
                f"{self._bin_path} has {found_bytes} bytes where its .idx promises {end_bytes}: "
                "it is truncated or belongs to another .idx; prepare it again"
            )
        return end_bytes // self.itemsize

    def _read_facts(self) -> dict[str, Any]:
        path = _path(self.prefix, "json")
        if not path.exists():
            return {}
        with _opened(path) as file:
            data = file.read()
        try:
            facts = orjson.loads(data)
            counts = facts["num_documents"], facts["num_tokens"]
            sizes = [int.__index__(size) for size, _ in facts["checksums"]]
            if any(size % self.itemsize for size in sizes):
                raise ValueError
            words = [facts["bin_sha256"], facts["tokenizer_sha256"], *(digest for _, digest in facts["checksums"])]
            if not (
                all(isinstance(word, str) for word in words) and min([*sizes, int.__index__(facts["vocabulary"])]) > 0
            ):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} cannot be understood; prepare the shard again") from None
        if counts != (self.num_documents, self.num_tokens) or sum(sizes) != self.num_tokens * self.itemsize:
            raise UserError(f"{path} counts other documents or tokens than {self._idx_path}; prepare the shard again")
        return facts


def _json(facts: dict[str, Any]) -> bytes:
    """A line a fact. Half surrogate pairs, which the reader refuses, become question marks."""

    def dumps(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    lines = ",\n".join(f"  {dumps(key)}: {dumps(value)}" for key, value in facts.items())
    return f"{{\n{lines}\n}}\n".encode("utf-8", "replace")


def _little(code: int) -> np.dtype:
    return np.dtype(DTYPES[code]).newbyteorder("<")


def _path(prefix: Path, part: str) -> Path:
    return Path(f"{prefix}.{part}")  # not with_suffix: a prefix may hold dots


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    """Append a file to another one within the kernel."""
    done = 0
    while done < num_bytes:
        count = os.sendfile(target.fileno(), source.fileno(), done, num_bytes - done)
        if not count:
            raise UserError(f"{source.name} has become shorter; prepare it again")
        done += count


def _pread(file: BinaryIO, num_bytes: int, place: int) -> bytes:
    try:
        return os.pread(file.fileno(), num_bytes, place)
    except OSError as error:
        raise UserError(
            f"cannot read {file.name} at byte {place} and behind: {error.strerror}; prepare it again"
        ) from None


def _map(path: Path, num_bytes: int) -> mmap.mmap:
    _allow_many_files()
    with _opened(path) as file:
        try:
            return mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
        except (ValueError, OSError) as error:
            raise UserError(f"cannot map {path}: {error}; see that it is whole, and raise `ulimit -n`") from None


@functools.cache
def _allow_many_files() -> None:
    """A map keeps its file open, and a corpus has thousands: more than the 1,024 that systems allow until asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; name the prefix that PREFIX.bin and .idx share"
        ) from None
