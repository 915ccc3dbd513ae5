"""Best-fit packing of a source: no document that fits into a sample is cut, and a sample is still a function of its
number.

A shard is packed in blocks of 2**18 documents, from their lengths alone, when a sample of the block is asked for; the
plans of the last few are kept. How many samples each block has must be known from the start: it is counted once and
kept beside the shard. An epoch takes the blocks in an order of its own, some at a time, and the samples of these in the
order of a keyed permutation. Which documents of equal length are neighbours, and their order in a sample, differ
between epochs; how many samples there are does not.

A document longer than a sample is cut into pieces that overlap by one token, so that each token is predicted once: the
last one is packed as a short document is, the others fill a sample each.
"""

import contextlib
import hashlib
import os
import secrets
from collections import Counter, OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacode.data.best_fit import count_bins, pack, stable_argsort
from megacode.data.counter import NUM_ROUNDS, Purpose, draw, draw_array, key_of, permute
from megacode.data.infill import Infiller
from megacode.data.packing import Kind, Piece, padding
from megacode.data.shards import Shards
from megacode.data.source import Source
from megacode.errors import UserError

BLOCK = 1 << 18
"""Documents that are packed together."""
GROUP = 8
"""Blocks whose samples are shuffled together."""
RESERVE = 7
"""Tokens that a document gets more, where there is infilling: four pieces, and tokens that the cuts break."""
_VERSION = 1

Int32Array = NDArray[np.int32]


@dataclass(frozen=True)
class Plan:
    """The samples of a block: first those of several documents, then the pieces that fill one alone.

    A document's last piece is among the former; it is the whole document where that fits.
    """

    items: Int32Array  # [documents]; numbers in the block, sample by sample
    starts: Int32Array  # [packed samples + 1]; where each sample's begin in `items`
    long: Int32Array  # [long documents]; numbers in the block
    long_ends: NDArray[np.int64]  # [long documents]; full pieces of them and those before

    @property
    def num_samples(self) -> int:
        """How many there are."""
        return len(self.starts) - 1 + int(self.long_ends[-1] if len(self.long_ends) else 0)


def full_pieces(lengths: Int32Array, sequence_length: int) -> Int32Array:
    """How many pieces of sequence_length + 1 tokens come off each document before its last piece: [documents]."""
    return np.maximum(lengths - 2, 0) // sequence_length


def plan(lengths: Int32Array, sequence_length: int, reserve: int, order: NDArray[np.int64]) -> Plan:
    """Pack documents.

    Args:
        lengths: of the documents, in tokens; empty ones are left out: [documents].
        sequence_length: A sample has one token more.
        reserve: Tokens that a document which fits with them gets in addition.
        order: a permutation of the documents, for what lengths leave open.
    """
    full = full_pieces(lengths, sequence_length)
    order = order[lengths[order] > 0]
    places = np.empty(len(lengths), np.int32)
    places[order] = np.arange(len(order), dtype=np.int32)
    sizes = _sizes(lengths[order], full[order], sequence_length, reserve)
    items, starts = pack(sizes, sequence_length + 1, np.arange(len(order)))
    long = np.flatnonzero(full).astype(np.int32)
    return Plan(order[items].astype(np.int32), starts, long, np.cumsum(full[long], dtype=np.int64))


def count(lengths: Int32Array, sequence_length: int, reserve: int) -> int:
    """How many samples `plan` gives."""
    full = full_pieces(lengths, sequence_length)
    sizes = _sizes(lengths, full, sequence_length, reserve)
    return count_bins(sizes[lengths > 0], sequence_length + 1) + int(full.sum(dtype=np.int64))


def _sizes(lengths: Int32Array, full: Int32Array, sequence_length: int, reserve: int) -> Int32Array:
    whole = np.minimum(lengths + reserve, sequence_length + 1)
    return np.where(full > 0, lengths - full * sequence_length, whole)


class BestFit:
    """The samples of a source under best-fit packing.

    Infilling documents are longer than they were: where there is infilling, each document is planned with a reserve,
    and one that still finds no room beside the others of its sample stays plain.
    """

    def __init__(self, source: Source, sequence_length: int, key: int, infiller: Infiller) -> None:
        self._source, self._length, self._key, self._infiller = source, sequence_length, key, infiller
        self._reserve = RESERVE if infiller.rate else 0
        counts = count_source(source, sequence_length, self._reserve)
        blocks = [
            np.stack([np.full(len(found), shard), np.arange(len(found))], axis=1) for shard, found in enumerate(counts)
        ]
        self._counts = np.concatenate(counts)  # [blocks]; samples
        self._blocks = np.concatenate(blocks)  # [blocks, 2]; shard, and which of its blocks
        self._plans: OrderedDict[tuple[int, int], Plan] = OrderedDict()
        self._orders: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    @property
    def per_epoch(self) -> int:
        return int(self._counts.sum())

    def pieces(self, sample: int, counts: Counter[str]) -> list[Piece]:
        epoch, block, index = self._locate(sample)
        found = self._plan(epoch, block)
        shard, number = self._blocks[block].tolist()
        shards, first = self._source.shard(shard), number * BLOCK
        num_packed = len(found.starts) - 1
        if index >= num_packed:
            place = int(np.searchsorted(found.long_ends, index - num_packed, "right"))
            document = first + int(found.long[place])
            number = index - num_packed - (int(found.long_ends[place - 1]) if place else 0)
            start = number * self._length
            return [self._part(shards, shard, document, start, start + self._length + 1)]
        items = found.items[found.starts[index] : found.starts[index + 1]]
        lengths = shards.lengths[first : first + BLOCK][items].astype(np.int32)
        starts = full_pieces(lengths, self._length) * self._length
        room = self._length + 1 - int((lengths - starts).sum())
        pieces = []
        for item, start, stop in zip(items.tolist(), starts.tolist(), lengths.tolist(), strict=True):
            piece = self._infilled(shard, first + item, stop, epoch, room, counts) if start == 0 else None
            piece = piece or self._part(shards, shard, first + item, start, stop)
            room -= len(piece.ids) - (stop - start)
            pieces.append(piece)
        counts["padding"] += room
        return [*pieces, padding(room)] if room else pieces

    def _infilled(
        self, shard: int, number: int, length: int, epoch: int, room: int, counts: Counter[str]
    ) -> Piece | None:
        if not self._infiller.rate:
            return None
        document = self._source.first_document(shard) + number
        found = self._infiller.infilled(self._source, document, self._key, epoch, length + room, counts)
        return found and Piece(found[0], found[1], document=document, stop=length)

    def _part(self, shards: Shards, shard: int, number: int, start: int, stop: int) -> Piece:
        """Tokens start..stop-1 of a document. The first one is predicted by the piece before it, if there is one."""
        document = self._source.first_document(shard) + number
        ids = shards.document_part(number, start, stop).astype(np.int64)
        spans = self._source.spans(document)
        unpredicted = None if spans is None else np.clip(spans - start, 0, stop - start)
        if start:
            first = np.array([[0, 1]])
            unpredicted = first if unpredicted is None else np.concatenate([first, unpredicted])
        kind: Kind = "whole" if (start, stop) == (0, int(shards.lengths[number])) else "cut"
        return Piece(ids, kind, True, document, start, stop, unpredicted)

    def _locate(self, sample: int) -> tuple[int, int, int]:
        """The epoch of a sample, its block, and which of the block's samples it is."""
        epoch, index = divmod(sample, self.per_epoch)
        order, ends = self._order(epoch)
        group_ends = ends[GROUP - 1 :: GROUP]
        group = int(np.searchsorted(group_ends, index, "right"))
        low = int(group_ends[group - 1]) if group else 0
        high = int(ends[min((group + 1) * GROUP, len(ends)) - 1])
        index = low + permute(index - low, high - low, _keys(self._key, epoch, group))
        place = int(np.searchsorted(ends, index, "right"))
        return epoch, int(order[place]), index - (int(ends[place - 1]) if place else 0)

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The blocks as an epoch takes them, and the samples of each and those before it: [blocks], [blocks]."""
        if epoch not in self._orders:
            words = draw_array(key_of(self._key, epoch, Purpose.BLOCKS), np.arange(len(self._counts)))
            order = np.argsort(words, kind="stable")
            self._orders[epoch] = order, np.cumsum(self._counts[order])
            _forget(self._orders, 2)
        return self._orders[epoch]

    def _plan(self, epoch: int, block: int) -> Plan:
        if (known := self._plans.get((epoch, block))) is not None:
            return known
        shard, number = self._blocks[block].tolist()
        lengths = _lengths(self._source.shard(shard), number)
        words = draw_array(key_of(self._key, epoch, Purpose.NEIGHBOURS, block), np.arange(len(lengths)))
        found = plan(lengths, self._length, self._reserve, stable_argsort(words >> np.uint64(32)))
        if found.num_samples != self._counts[block]:
            prefix = self._source.prefixes[shard]
            raise UserError(
                f"{prefix}.idx gives {found.num_samples} samples of its block {number} and {prefix}.best_fit_* counts "
                f"{self._counts[block]}; remove the latter, and look with `megacode data verify {prefix}`"
            )
        self._plans[epoch, block] = found
        _forget(self._plans, 2 * GROUP)  # those of the groups on both sides of a seam
        return found


def _forget(kept: OrderedDict[Any, Any], count: int) -> None:
    """Let go of what was added first, beyond so many."""
    while len(kept) > count:
        kept.popitem(last=False)


@lru_cache(maxsize=64)
def _keys(key: int, epoch: int, group: int) -> list[int]:
    return draw(key_of(key, epoch, Purpose.PERMUTATION), group, NUM_ROUNDS)


def count_source(source: Source, sequence_length: int, reserve: int) -> list[NDArray[np.int64]]:
    """Samples of each block of each shard of a source: for each shard [blocks].

    Processes that start together share the counting without knowing of each other: each goes through the shards in a
    random order of its own, and takes what another one has counted and kept meanwhile.
    """
    counts: dict[int, NDArray[np.int64]] = {}
    for shard in np.random.default_rng().permutation(len(source.prefixes)).tolist():
        counts[shard] = count_samples(source.shard(shard), sequence_length, reserve)
    return [counts[shard] for shard in range(len(counts))]


def count_samples(shards: Shards, sequence_length: int, reserve: int) -> NDArray[np.int64]:
    """Samples of each block of a shard. They are kept in PREFIX.best_fit_LENGTH_RESERVE, which is made here if it is
    missing, damaged or of another shard, and if it can be: [blocks]."""
    path = Path(f"{shards.prefix}.best_fit_{sequence_length}_{reserve}")
    facts = np.array([_VERSION, BLOCK, shards.num_documents, shards.num_tokens, *_identity(shards)], "<i8")
    num_blocks = -(-shards.num_documents // BLOCK)
    if (kept := _read_kept(path, facts, num_blocks)) is not None:
        return kept
    counts = [count(_lengths(shards, number), sequence_length, reserve) for number in range(num_blocks)]
    data = np.concatenate([facts, np.array(counts, "<i8")]).tobytes()
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")  # machines have equal process ids
    try:
        temporary.write_bytes(data + hashlib.sha256(data).digest())
        os.replace(temporary, path)
    except OSError:  # a folder that can't be written: the next start counts again
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return np.array(counts, np.int64)


def _read_kept(path: Path, facts: NDArray[np.int64], num_blocks: int) -> NDArray[np.int64] | None:
    """The counts that are kept in a file, if it is whole and says these facts: [blocks]."""
    num_bytes = 8 * (len(facts) + num_blocks)
    try:
        with path.open("rb") as file:
            data, digest, rest = file.read(num_bytes), file.read(32), file.read(1)
    except OSError:
        return None
    if rest or hashlib.sha256(data).digest() != digest or not data.startswith(facts.tobytes()):
        return None
    return np.frombuffer(data, "<i8")[len(facts) :].astype(np.int64)


def _lengths(shards: Shards, block: int) -> Int32Array:
    """Of the documents of a block: [documents].

    Raises:
        UserError: they are not those of the tokens that the block has.
    """
    first, stop = block * BLOCK, min((block + 1) * BLOCK, shards.num_documents)
    lengths = shards.lengths[first:stop].astype(np.int32)
    num_tokens = shards.document_start(stop) - shards.document_start(first)
    if len(lengths) and (lengths.min() < 0 or lengths.sum(dtype=np.int64) != num_tokens):
        raise _damaged(shards, first)
    return lengths


def _damaged(shards: Shards, document: int) -> UserError:
    return UserError(
        f"{shards.prefix}.idx is damaged: from document {document} on its lengths are not those of the tokens; "
        "prepare it again"
    )


def _identity(shards: Shards) -> list[int]:
    """Two words that differ when the shard does: by its checksum, or without one by size and time of its index."""
    stat = Path(f"{shards.prefix}.idx").stat()
    what = shards.bin_sha256 or f"{stat.st_size} {stat.st_mtime_ns}"
    return np.frombuffer(hashlib.sha256(what.encode()).digest()[:16], np.int64).tolist()
