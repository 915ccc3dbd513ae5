"""Loss spans: which tokens of a shard's documents are not to be predicted, in PREFIX.spans beside the shard.

Little-endian: magic b"MEGASPAN", version u64, documents u64, spans u64; then the number of each document's first span
and at the end the number of spans (int64 [documents + 1]); then start and stop of each span in tokens of its document,
framing counted (int32 [spans, 2]), rising and not overlapping. A shard without such a file has no spans: all its tokens
count.
"""

import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.errors import UserError

MAGIC = b"MEGASPAN"
HEADER = struct.Struct("<8sQQQ")  # magic, version, documents, spans
_BLOCK = 1 << 20  # documents, or spans, that are looked at in one piece
_VERIFIED = 1 << 16  # documents that are verified in one piece, with all their spans

SpanArray = NDArray[np.int32]


class SpansWriter:
    """Writes the spans of a shard, a document at a time. The file appears when the `with` block ends without exception,
    and only if some document has spans; one that stood there goes either way.

    Args:
        prefix: Of the shard: the file is PREFIX.spans.
        facts: What goes to the shard's PREFIX.json: gets `num_spans` and `spans_sha256`, of the whole file, when the
            `with` block ends, so that block must end before the shard is finished.
    """

    def __init__(self, prefix: str | Path, facts: dict[str, Any] | None = None) -> None:
        self.prefix = Path(prefix)
        self._facts = {} if facts is None else facts
        self.num_documents = 0
        self.num_spans = 0

    def __enter__(self) -> "SpansWriter":
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        # Both wait on disk, so that memory does not grow with the corpus.
        self._firsts = self._temporary("firsts").open("w+b")
        self._spans = self._temporary("pairs").open("w+b")
        return self

    def add_document(self, spans: Sequence[tuple[int, int]]) -> None:
        """Append a document's spans (start, stop), rising and not overlapping; none is the usual case."""
        self._firsts.write(struct.pack("<q", self.num_spans))
        end = 0
        for start, stop in spans:
            assert end <= start < stop, f"spans {spans} do not rise, or one is empty"
            self._spans.write(struct.pack("<ii", start, stop))
            end = stop
        self.num_documents += 1
        self.num_spans += len(spans)

    def add_documents(self, part: "Spans") -> None:
        """Append all documents of another shard's spans."""
        for block in part.first_spans():
            self._firsts.write((block + self.num_spans).astype("<i8").tobytes())
        for pairs in part.pairs():
            self._spans.write(pairs.tobytes())
        self.num_documents += part.num_documents
        self.num_spans += part.num_spans

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._firsts.close()
            self._spans.close()
            for part in ("firsts", "pairs", "whole"):
                self._temporary(part).unlink(missing_ok=True)

    def _temporary(self, part: str) -> Path:
        return Path(f"{self.prefix}.spans.{part}.{os.getpid()}.tmp")

    def _finish(self) -> None:
        path = spans_path(self.prefix)
        self._facts["num_spans"] = self.num_spans
        if not self.num_spans:
            path.unlink(missing_ok=True)
            return
        self._firsts.write(struct.pack("<q", self.num_spans))
        header = HEADER.pack(MAGIC, 1, self.num_documents, self.num_spans)
        sha256 = hashlib.sha256(header)
        with self._temporary("whole").open("wb") as whole:
            whole.write(header)
            for file in (self._firsts, self._spans):
                file.seek(0)
                while block := file.read(8 * _BLOCK):
                    sha256.update(block)
                    whole.write(block)
        self._facts["spans_sha256"] = sha256.hexdigest()
        os.replace(self._temporary("whole"), path)


def merge(parts: Iterable[tuple[str | Path, int]], prefix: str | Path, facts: dict[str, Any] | None = None) -> None:
    """Write PREFIX.spans of a shard whose documents are those of other shards, one shard after the other.

    Args:
        parts: prefix and number of documents of each; those without a .spans file have no spans.
        prefix: Of the whole.
        facts: See `SpansWriter`.

    Raises:
        UserError: the file of a part is damaged.
    """
    with SpansWriter(prefix, facts) as writer:
        for part, num_documents in parts:
            writer.add_documents(Spans(part, num_documents))


class Spans:
    """The spans of a shard, memory-mapped; without the file PREFIX.spans there are none. Opening reads the header only.

    Args:
        prefix: Of the shard.
        num_documents: That it has.
        num_spans: That it must have, by PREFIX.json; None where that is not known.

    Attributes:
        num_documents, num_spans: Counts.

    Raises:
        UserError: the file is truncated, of another format, or has other documents than the shard, or
            there are other spans than there must be.
    """

    def __init__(self, prefix: str | Path, num_documents: int, num_spans: int | None = None) -> None:
        self.path = spans_path(prefix)
        self.num_documents = num_documents
        self.num_spans = self._read_header()
        if num_spans not in (None, self.num_spans):
            raise UserError(
                f"{self.path} is missing or another one: {prefix}.json says {num_spans} loss spans and there are "
                f"{self.num_spans}; put it back, or prepare the shard again"
            )
        count = num_documents + 1 if self.num_spans else 0
        self._firsts = _map(self.path, "<i8", HEADER.size, (count,))  # [num_documents + 1]
        self._pairs = _map(
            self.path, "<i4", HEADER.size + 8 * count, (self.num_spans, 2)
        )  # [num_spans, start and stop]
        for place, expected in ((0, 0), (num_documents, self.num_spans)):
            if self.num_spans and int(self._firsts[place]) != expected:
                raise self._damaged(self._first_place(place), "a wrong number of a first span")

    def of(self, document: int) -> SpanArray:
        """Spans of a document: [spans, 2], start and stop of each.

        Raises:
            UserError: the file is damaged.
        """
        assert 0 <= document < self.num_documents
        if not self.num_spans:
            return np.empty((0, 2), np.int32)
        first, last = int(self._firsts[document]), int(self._firsts[document + 1])
        if not 0 <= first <= last <= self.num_spans:
            place = self._first_place(document + (0 <= first <= self.num_spans))
            raise self._damaged(place, "a wrong number of a first span")
        pairs = np.array(self._pairs[first:last], np.int32)
        if (wrong := _first_wrong(pairs)) is not None:
            raise self._damaged(self._pair_place(first + wrong), "a span that does not follow the one before it")
        return pairs

    def first_spans(self) -> Iterable[NDArray[np.int64]]:
        """The number of each document's first span, in blocks."""
        for start in range(0, self.num_documents, _BLOCK):
            stop = min(start + _BLOCK, self.num_documents)
            yield np.array(self._firsts[start:stop]) if self.num_spans else np.zeros(stop - start, np.int64)

    def pairs(self) -> Iterable[SpanArray]:
        """All spans, in blocks [spans, 2]."""
        for start in range(0, self.num_spans, _BLOCK):
            yield self._pairs[start : start + _BLOCK]

    def verify(self, lengths: NDArray[np.integer[Any]], sha256: str | None = None) -> None:
        """Read everything: spans must rise within each document and end before it does.

        Args:
            lengths: tokens of each document: [num_documents].
            sha256: of the file; None where that is not known.

        Raises:
            UserError: the file is damaged, or belongs to another shard.
        """
        for start in range(0, self.num_documents if self.num_spans else 0, _VERIFIED):
            stop = min(start + _VERIFIED, self.num_documents)
            firsts = np.array(self._firsts[start : stop + 1], np.int64)
            falls = np.flatnonzero((np.diff(firsts) < 0) | (firsts[1:] > self.num_spans))
            if falls.size:
                self.of(start + int(falls[0]))
            documents = np.repeat(np.arange(start, stop), np.diff(firsts))  # [spans of these documents]
            pairs = np.array(self._pairs[firsts[0] : firsts[-1]], np.int64)
            if (wrong := _first_wrong(pairs, documents)) is not None:
                self.of(int(documents[wrong]))
            beyond = np.flatnonzero(pairs[:, 1] > lengths[start:stop].astype(np.int64)[documents - start])
            if beyond.size:
                span = int(beyond[0])
                document = int(documents[span])
                byte = self._pair_place(int(firsts[0]) + span) + 4
                raise self._damaged(
                    byte,
                    f"a span of document {document} ends at token {pairs[span, 1]} and the document has "
                    f"{lengths[document]}",
                )
        if self.num_spans and sha256 is not None:
            with self.path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise UserError(
                    f"{self.path} is damaged: it has another checksum than its .json says; prepare the shard again"
                )

    def _read_header(self) -> int:
        """The number of spans, after checking what the header and the file's size can tell."""
        try:
            with self.path.open("rb") as file:
                data = file.read(HEADER.size)
                size_bytes = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}; prepare the shard again") from None
        if len(data) < HEADER.size or not data.startswith(MAGIC):
            raise UserError(f"{self.path} is no file of loss spans; prepare the shard again")
        _, version, num_documents, num_spans = HEADER.unpack(data)
        if version != 1:
            raise UserError(f"{self.path} has version {version} and this reads version 1; prepare the shard again")
        if num_documents != self.num_documents:
            raise UserError(
                f"{self.path} is of {num_documents} documents and the shard has {self.num_documents}; "
                "prepare the shard again"
            )
        expected_bytes = HEADER.size + 8 * (num_documents + 1) + 8 * num_spans
        if size_bytes != expected_bytes:
            raise UserError(
                f"{self.path} has {size_bytes} bytes where its header promises {expected_bytes}: it is truncated or "
                "damaged; prepare the shard again"
            )
        return int(num_spans)

    def _first_place(self, document: int) -> int:
        """The byte where the number of a document's first span stands."""
        return HEADER.size + 8 * document

    def _pair_place(self, span: int) -> int:
        """The byte where a span stands."""
        return HEADER.size + 8 * (self.num_documents + 1 + span)

    def _damaged(self, byte: int, what: str) -> UserError:
        return UserError(f"{self.path} is damaged at byte {byte}: {what}; prepare the shard again")


def _first_wrong(pairs: NDArray[np.integer[Any]], documents: NDArray[np.integer[Any]] | None = None) -> int | None:
    """The first span that is empty, begins before its document, or before the end of the one before it.

    Args:
        pairs: start and stop of spans: [spans, 2].
        documents: whose they are; left out, all are one document's: [spans].
    """
    wrong = (pairs[:, 0] < 0) | (pairs[:, 0] >= pairs[:, 1])
    overlaps = pairs[1:, 0] < pairs[:-1, 1]
    wrong[1:] |= overlaps if documents is None else overlaps & (documents[1:] == documents[:-1])
    return int(wrong.argmax()) if wrong.any() else None


def spans_path(prefix: str | Path) -> Path:
    """Where the spans of a shard are."""
    return Path(f"{prefix}.spans")


def _map(path: Path, dtype: str, offset_bytes: int, shape: tuple[int, ...]) -> NDArray[Any]:
    if 0 in shape:  # numpy refuses to map nothing
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset_bytes, shape)
