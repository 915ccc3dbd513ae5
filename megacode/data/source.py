"""A source: many shards laid end to end, with the interface of one, in memory that does not grow with them."""

import bisect
import glob
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megacode.data import facts
from megacode.data.shards import IntArray, Shards
from megacode.data.spans import SpanArray, Spans
from megacode.errors import UserError

_MAX_OPEN = 128
"""Shards that are open at the same time, over all sources: each takes two to four of usually 1,024 descriptors."""


class OpenShards:
    """The shards that are mapped at present: those that were used last. Pickled, it is an empty one."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, tuple[Shards, Spans]] = OrderedDict()

    def __reduce__(self) -> tuple[type["OpenShards"], tuple[()]]:
        return OpenShards, ()

    def get(self, prefix: Path) -> tuple[Shards, Spans]:
        """A shard and its spans.

        Raises:
            UserError: it can't be opened.
        """
        if (known := self._open.get(prefix)) is not None:
            self._open.move_to_end(prefix)
            return known
        shards = Shards(prefix)
        found = self._open[prefix] = shards, Spans(prefix, shards.num_documents, facts.num_spans(shards))
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)
        return found


class Source:
    """Shards laid end to end: documents and tokens are numbered through.

    Opening looks at each shard once and keeps its counts only.

    Args:
        name: For metrics, checkpoints and errors.
        prefixes: Of the shards, in order.
        pool: Shared by the sources of a stream.
        check: Called with each shard when it is opened first.

    Attributes:
        name, prefixes: As given.
        num_documents, num_tokens: Counts over all shards.
        has_spans: Whether some shard has loss spans.
        identity: Hash of what the shards are, by PREFIX.json where there is one and else by their counts.

    Raises:
        UserError: a shard is missing or damaged, or `check` raises it.
    """

    def __init__(
        self,
        name: str,
        prefixes: Sequence[Path],
        pool: OpenShards | None = None,
        check: Callable[[Shards], None] = lambda shards: None,
    ) -> None:
        self.name, self.prefixes = name, tuple(prefixes)
        self.has_spans = False
        self._pool = pool or OpenShards()
        # [shards + 1]: where each shard begins in the source's tokens and documents; lists, for bisect.
        self._token_starts, self._document_starts = [0], [0]
        identity = hashlib.sha256()
        for prefix in self.prefixes:
            shards, spans = self._pool.get(prefix)
            check(shards)
            self.has_spans |= spans.num_spans > 0
            self._token_starts.append(self._token_starts[-1] + shards.num_tokens)
            self._document_starts.append(self._document_starts[-1] + shards.num_documents)
            identity.update(f"{shards.num_documents} {shards.num_tokens} {shards.bin_sha256}\n".encode())
            if spans.num_spans:
                identity.update(f"{spans.num_spans} {facts.spans_sha256(shards)}\n".encode())
        self.num_tokens, self.num_documents = self._token_starts[-1], self._document_starts[-1]
        self.identity = identity.hexdigest()

    def shard(self, number: int) -> Shards:
        """A shard by its place among `prefixes`.

        Raises:
            UserError: it is not the one that was there when the source was opened.
        """
        return self._get(number)[0]

    def shard_of(self, document: int) -> tuple[int, int]:
        """The place of the shard that holds a document, and the document's number in it."""
        assert 0 <= document < self.num_documents
        shard = bisect.bisect_right(self._document_starts, document) - 1
        return shard, document - self._document_starts[shard]

    def first_document(self, shard: int) -> int:
        """The number of a shard's first document."""
        return self._document_starts[shard]

    def document(self, index: int) -> IntArray:
        """Ids of a document, framing included: [tokens]."""
        shard, number = self.shard_of(index)
        return self.shard(shard).document(number)

    def spans(self, index: int) -> SpanArray | None:
        """Loss spans of a document [spans, start and stop]; None where it has none."""
        if not self.has_spans:
            return None
        shard, number = self.shard_of(index)
        spans = self._get(shard)[1].of(number)
        return spans if len(spans) else None

    def document_start(self, index: int) -> int:
        """Where a document starts in the concatenation; for index num_documents, where the last one ends."""
        if index == self.num_documents:
            return self.num_tokens
        shard, number = self.shard_of(index)
        return self._token_starts[shard] + self.shard(shard).document_start(number)

    def document_at(self, token: int) -> int:
        """The document that holds a token of the concatenation."""
        assert 0 <= token < self.num_tokens
        shard = bisect.bisect_right(self._token_starts, token) - 1
        return self._document_starts[shard] + self.shard(shard).document_at(token - self._token_starts[shard])

    def tokens(self, start: int, stop: int) -> IntArray:
        """Ids start..stop-1 of all documents laid end to end: [stop - start]."""
        assert 0 <= start <= stop <= self.num_tokens
        shard = bisect.bisect_right(self._token_starts, start, hi=len(self.prefixes)) - 1
        parts: list[IntArray] = []
        while start < stop or not parts:
            low, high = self._token_starts[shard], self._token_starts[shard + 1]
            parts.append(self.shard(shard).tokens(start - low, min(stop, high) - low))
            start, shard = min(stop, high), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def documents_from(self, token: int) -> Iterator[tuple[int, int, int]]:
        """The documents from the one that holds a token on: number, where it starts, where it ends. Empty ones, which
        Megatron's files may hold, are left out."""
        if token == self.num_tokens:
            return
        document = self.document_at(token)
        count = 8
        while document < self.num_documents:
            shard, number = self.shard_of(document)
            shards = self.shard(shard)
            stop = min(number + count, shards.num_documents)
            starts = shards.document_starts(number, stop).tolist()
            starts.append(shards.document_start(stop))
            base = self._token_starts[shard]
            for offset in range(stop - number):
                if starts[offset] < starts[offset + 1]:
                    yield document + offset, base + starts[offset], base + starts[offset + 1]
            document, count = document + stop - number, 2 * count

    def _get(self, number: int) -> tuple[Shards, Spans]:
        found = self._pool.get(self.prefixes[number])
        num_tokens = self._token_starts[number + 1] - self._token_starts[number]
        if found[0].num_tokens != num_tokens:
            raise UserError(
                f"the shard {self.prefixes[number]} has {found[0].num_tokens} tokens and had {num_tokens} when the run "
                "began; leave the files of a run as they are"
            )
        return found


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """The prefixes that a recipe names: each itself or, with *, ? or [, all shards that it matches, in order of name.

    Those of a preparation that is not finished (PREFIX.parts/UNIT/train) are never matched.

    Raises:
        UserError: a pattern matches nothing.
    """
    found = []
    for pattern in patterns:
        if not glob.has_magic(pattern):
            found.append(Path(pattern))
            continue
        matches = [
            match
            for match in sorted(glob.glob(f"{pattern}.idx", recursive=True))
            if ".parts" not in Path(match).parent.parent.suffixes
        ]
        if not matches:
            raise UserError(f"data.train: no shard matches {pattern} (a prefix: PREFIX.bin and PREFIX.idx); mend it")
        found += [Path(match.removesuffix(".idx")) for match in matches]
    return found
