"""`megacode data inspect`: what is to be said of a shard; inspect_text.py says it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megacode.data import facts
from megacode.data.counter import below, draw, key_of
from megacode.data.infill import Infiller
from megacode.data.lengths import Lengths, measure
from megacode.data.packing import Int64Array, Kind
from megacode.data.readable import Run, runs
from megacode.data.shards import Shards
from megacode.data.source import Source
from megacode.data.spans import Spans
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError

MOST_CHARACTERS = 800
"""Of a run of text, more is left out in its middle."""
MOST_TOKENS = 1 << 16
"""Of a document, so many are decoded."""
NUM_TRIED = 200
"""Documents that are made infilling documents to see how many can be."""


@dataclass(frozen=True)
class Question:
    """What is to be looked at."""

    prefix: Path
    tokenizer: Path | None
    samples: int
    seed: int
    sequence_length: int
    infilling_rate: float


@dataclass(frozen=True)
class Shown:
    """A document, decoded."""

    document: int
    num_tokens: int
    kind: Kind
    cuts: tuple[int, int] | None
    """Of an infilling document: see `Infiller.cuts`."""
    runs: list[Run]


@dataclass(frozen=True)
class Found:
    """What is to be said of a shard."""

    question: Question
    shards: Shards
    num_spans: int
    lengths: Lengths
    tokenizer: str
    """Whether it is the one that made the shard."""
    documents: list[Shown]
    infilled: list[Shown]
    tried: Counter[str] = field(default_factory=Counter)
    """What became of documents that were tried to be infilled; see `Infiller`."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        lengths, shards = self.lengths, self.shards
        return {
            "prefix": str(shards.prefix),
            "num_documents": shards.num_documents,
            "num_tokens": shards.num_tokens,
            "num_spans": self.num_spans,
            "bytes_per_token": bytes_per_token(shards),
            "facts": {key: value for key, value in shards.facts.items() if key != "checksums"},
            "tokenizer": self.tokenizer,
            "sequence_length": self.question.sequence_length,
            "infilling_rate": self.question.infilling_rate,
            "shortest": lengths.shortest,
            "longest": lengths.longest,
            "lengths": [
                {"from": low, "to": high, "documents": documents, "tokens": tokens}
                for (low, high), documents, tokens in classes(lengths)
            ],
            "too_long": asdict(lengths.too_long),
            "uncut": {packing: asdict(amount) for packing, amount in lengths.uncut.items()},
            "tried": dict(self.tried),
            "documents": [asdict(shown) for shown in self.documents],
            "infilled": [asdict(shown) for shown in self.infilled],
        }


def look(question: Question) -> Found:
    """Read a shard's facts and lengths, and decode some documents where the tokenizer is given.

    Raises:
        UserError: a file is missing or damaged, or the shard is empty.
    """
    source = Source(question.prefix.name, [question.prefix])
    shards = source.shard(0)
    if not shards.num_documents:
        raise UserError(f"the shard {question.prefix} is empty; prepare one with documents")
    spans = Spans(question.prefix, shards.num_documents, facts.num_spans(shards))
    lengths = measure(shards, question.sequence_length)
    said, tokenizer = _compare(shards, question.tokenizer)
    found = Found(question, shards, spans.num_spans, lengths, said, [], [])
    if tokenizer is not None:
        for document in _random_documents(shards, question.seed, question.samples):
            found.documents.append(_plain(source, document, tokenizer))
        if question.infilling_rate and tokenizer.has_infilling:
            _try_infilling(found, source, tokenizer)
    return found


def bytes_per_token(shards: Shards) -> float | None:
    """Bytes of text for each token; None where PREFIX.json does not tell them."""
    num_bytes = sum(counts["bytes"] for counts in facts.languages(shards).values())
    return num_bytes / shards.num_tokens if num_bytes and shards.num_tokens else None


def classes(lengths: Lengths) -> Iterator[tuple[tuple[int, int], int, int]]:
    """(shortest, longest), documents and tokens of the classes from the first to the last that has documents."""
    filled = np.flatnonzero(lengths.documents)
    for number in range(int(filled[0]), int(filled[-1]) + 1):
        bounds = (2 ** (number - 1), 2**number - 1) if number else (0, 0)
        yield bounds, int(lengths.documents[number]), int(lengths.tokens[number])


def _compare(shards: Shards, path: Path | None) -> tuple[str, Tokenizer | None]:
    """What is to be said of the tokenizer, and the tokenizer where it can decode the shard."""
    known = shards.tokenizer_sha256
    said = f"sha256 {known}" if known else f"not known ({shards.prefix}.json does not name it)"
    if path is None:
        return f"{said}; give --tokenizer to see documents", None
    tokenizer = Tokenizer(path)
    if known not in (None, tokenizer.sha256):
        return f"{said}; {path} is ANOTHER, sha256 {tokenizer.sha256}: nothing is decoded", None
    return (f"{path} made it" if known else f"{said}; decoded with {path}"), tokenizer


def _random_documents(shards: Shards, seed: int, count: int) -> Iterator[int]:
    """Numbers of different documents, the same for the same seed."""
    seen: set[int] = set()
    number = 0
    while len(seen) < min(count, shards.num_documents):
        document = below(draw(key_of(seed), number)[0], shards.num_documents)
        number += 1
        if document not in seen:
            seen.add(document)
            yield document


def _plain(source: Source, document: int, tokenizer: Tokenizer) -> Shown:
    ids = source.document(document)
    loss = np.arange(len(ids)) > 0
    if (spans := source.spans(document)) is not None:
        for start, stop in spans.tolist():
            loss[start:stop] = False
    first = np.asarray(ids[:MOST_TOKENS], np.int64)
    kind: Kind = "whole" if len(first) == len(ids) else "cut"
    shown = _decoded(first, kind, None, loss[:MOST_TOKENS], tokenizer, source)
    return Shown(document, len(ids), kind, None, shown)


def _try_infilling(found: Found, source: Source, tokenizer: Tokenizer) -> None:
    """Make infilling documents of some that a sample holds; the first ones are shown."""
    question, room = found.question, found.question.sequence_length + 1
    infiller, key = Infiller(tokenizer, question.infilling_rate, 0.5), key_of(question.seed)
    for document in _random_documents(found.shards, question.seed, 4 * NUM_TRIED):
        if found.tried["uncut"] == NUM_TRIED:
            return
        if not 0 < len(source.document(document)) <= room:
            continue
        made = infiller.infilled(source, document, key, 0, room, found.tried)
        if made is not None and len(found.infilled) < question.samples:
            ids, kind = made
            cuts = infiller.cuts(source, document, key, 0)
            shown = _decoded(ids, kind, cuts, np.arange(len(ids)) > 0, tokenizer, source)
            found.infilled.append(Shown(document, len(ids), kind, cuts, shown))


def _decoded(
    ids: Int64Array, kind: Kind, cuts: tuple[int, int] | None, loss: Any, tokenizer: Tokenizer, source: Source
) -> list[Run]:
    """The runs of a document, long ones without their middle."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocabulary:
        raise UserError(
            f"{source.prefixes[0]}.bin has ids that are no rows of {tokenizer.path}; `megacode data verify` says where"
        )
    return [replace(run, text=_shortened(run.text)) for run in runs(ids, kind, cuts, loss, tokenizer)]


def _shortened(text: str) -> str:
    half = MOST_CHARACTERS // 2
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
