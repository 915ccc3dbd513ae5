"""Exact and near-duplicate removal, and decontamination, as datatrove steps whose ranks are the units of a job.

Nothing is copied: each step ends in lists of the documents to drop, PREFIX.parts/dropped/UNIT.STEP.jsonl, which the
tokenizing stage reads. datatrove (0.10.1) gives signatures, the search for equal ones, and the executors.

A signature has 15 buckets. The first is the hash of the whole text: equal ones are exact duplicates. The others are
MinHash (Broder 1997) over runs of 5 words: 14 buckets of 8 hashes, as FineWeb. Two documents of Jaccard similarity s
share a bucket with the probability 1 - (1 - s^8)^14: a half at 0.68, 0.92 at 0.8, 0.05 at 0.5; (1/14)^(1/8) = 0.72 is
called the threshold. Nothing verifies them afterwards, and a duplicate of a duplicate counts.
"""

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
from datatrove.utils.word_tokenizers import WhitespaceTokenizer
from numpy.typing import NDArray

from megacode.data.preparing.decontaminate import Index
from megacode.data.preparing.job import Job, documents
from megacode.data.preparing.stages import BENCHMARKS
from megacode.data.preparing.words import Hashes, ngram_hashes, word_hashes

SHINGLE = 5
NUM_BUCKETS = 14
HASHES_PER_BUCKET = 8
_PRIME = np.uint64((1 << 61) - 1)
_BLOCK = 256  # runs whose hashes are made at once: what fits into a core's cache
Ids = NDArray[np.uint64]


def config(near: bool) -> MinhashConfig:
    """What is signed: the whole text, and with `near` its runs of words too."""
    return MinhashConfig(SHINGLE, num_buckets=1 + NUM_BUCKETS * near, hashes_per_bucket=HASHES_PER_BUCKET)


class Documents(PipelineStep):
    """The documents of unit `rank` of a job. PREFIX.parts is `folder`."""

    type, name = "reader", "documents of a unit"

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = str(folder)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for ordinal, document in enumerate(documents(Job.load(self.folder), rank)):
            yield Document(text=document.text, id=str(ordinal))


class Decontaminate(PipelineStep):
    """Lists the documents that hold text of a benchmark and passes them on without text, so that none of them stands
    for its clean duplicates."""

    type, name = "filter", "decontamination"

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        index = Index.load(self.folder / BENCHMARKS)
        dropped: list[dict[str, object]] = []
        for ordinal, document in enumerate(data):
            found = index.find(document.text)
            if found:
                name, run = found
                dropped.append({"document": ordinal, "reason": f"contaminated: {name}", "found": run})
                document.text = ""
            yield document
        write_dropped(self.folder, rank, "contaminated", dropped)


class Signature(MinhashDedupSignature):
    """datatrove's signatures of our words. What they hash is another, their arithmetic is the same; it does not hold
    all runs times all hashes, and is some times faster."""

    def __init__(self, folder: str | Path, near: bool) -> None:
        # Its tokenizer is not used, and the default one needs spaCy.
        super().__init__(str(Path(folder, "signatures")), config(near), language=WhitespaceTokenizer())
        self.near = near

    def get_shingles(self, text: str) -> Hashes:
        """Two halves of the text's hash, then its runs of words without repetition; nothing for an empty text."""
        if not text:
            return np.empty(0, np.uint64)
        whole = xxhash.xxh3_128_intdigest(text.encode())
        halves = np.array([whole & 0xFFFFFFFFFFFFFFFF, whole >> 64], np.uint64)
        if not self.near:
            return halves
        runs = np.unique(ngram_hashes(word_hashes(text), SHINGLE))
        # A text of fewer words has no run; signed by its hash, it is like its exact duplicates only.
        return np.concatenate([halves, runs if runs.size else halves[:1]])

    def get_signature(self, shingles: Hashes) -> list[list[int]]:
        """The hashes of each bucket. datatrove searches values below 2^61 - 1 only."""
        exact = [*(shingles[:2] % _PRIME).tolist(), *[0] * (HASHES_PER_BUCKET - 2)]
        if not self.near:
            return [exact]
        return [exact, *self.minima(shingles[2:]).reshape(NUM_BUCKETS, HASHES_PER_BUCKET).tolist()]

    def minima(self, runs: Hashes) -> Hashes:
        """The least of (run * a + b) % (2^61 - 1) for each hash function a, b. Returns: [buckets * hashes]."""
        a, b = (values[:, : NUM_BUCKETS * HASHES_PER_BUCKET] for values in self.parameters)
        least = np.full(a.shape[1], _PRIME)
        for start in range(0, len(runs), _BLOCK):
            values = runs[start : start + _BLOCK, None] * a + b
            values = (values & _PRIME) + (values >> np.uint64(61))
            np.minimum(values, values - _PRIME, out=values)  # unsigned: what is below the prime wraps to something huge
            np.minimum(least, values.min(axis=0), out=least)
        return least


class Buckets(MinhashDedupBuckets):
    """datatrove's search for equal signatures, one bucket a rank. It opens the signatures of all units at once."""

    def __init__(self, folder: str | Path, near: bool) -> None:
        folders = str(Path(folder, "signatures")), str(Path(folder, "pairs"))
        super().__init__(*folders, config=config(near), lines_to_buffer=128)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        super().run(data, rank, world_size)


class Cluster(PipelineStep):
    """From pairs to the lists of documents to drop. Of all that are joined by pairs the first of the corpus stays.

    datatrove's own step keeps one that depends on the order of unions, which would be another for exact than for near
    duplicates, and is a dictionary of Python numbers.
    """

    type, name = "dedup", "clusters"

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        buckets = [_pairs(path) for path in sorted((self.folder / "pairs").glob("*.dups"))]
        exact = duplicates(buckets[0])
        near = np.setdiff1d(duplicates(np.concatenate(buckets)), exact, assume_unique=True)
        for step, reason, dropped in (("exact", "exact duplicate", exact), ("near", "near duplicate", near)):
            units, starts = np.unique(dropped >> np.uint64(32), return_index=True)
            for unit, part in zip(units.tolist(), np.split(dropped, starts[1:]), strict=False):
                ordinals = (part & np.uint64(0xFFFFFFFF)).tolist()
                write_dropped(self.folder, unit, step, [{"document": n, "reason": reason} for n in ordinals])


def duplicates(pairs: Ids) -> Ids:
    """All but the least of each group that pairs join, sorted.

    Args:
        pairs: [pairs, 2].
    """
    ids, places = np.unique(pairs, return_inverse=True)
    a, b = places.reshape(-1, 2).T
    root = np.arange(len(ids))
    while True:
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        if np.array_equal(low, high):
            return ids[root != np.arange(len(ids))]
        np.minimum.at(root, high, low)
        while not np.array_equal(root, root[root]):
            root = root[root]


def write_dropped(folder: Path, unit: int, step: str, dropped: list[dict[str, object]]) -> None:
    """The list of a unit's documents that a step drops; none where it drops none."""
    if dropped:
        path = folder / "dropped" / f"{unit:06d}.{step}.jsonl"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text("".join(json.dumps(line) + "\n" for line in dropped), encoding="utf-8")
        partial.replace(path)


def _pairs(path: Path) -> Ids:
    """What `MinhashDedupBuckets` writes: unit, document, unit, document. Returns: [pairs, 2], unit << 32 | document."""
    numbers = np.fromfile(path, dtype="<u4").reshape(-1, 2, 2).astype(np.uint64)
    return numbers[..., 0] << np.uint64(32) | numbers[..., 1]
