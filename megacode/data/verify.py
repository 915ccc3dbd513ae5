"""Everything about a shard that its files can prove of each other: more than reading it relies on."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megacode.data import facts
from megacode.data.shards import Shards
from megacode.data.spans import Spans, spans_path
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError


@dataclass(frozen=True)
class Verified:
    """A shard without a fault."""

    num_documents: int
    num_tokens: int
    num_spans: int
    unchecked: tuple[str, ...]
    """What could not be checked, and why."""


def num_bytes(prefix: str | Path) -> int:
    """Bytes of the files that `verify` reads whole."""
    return sum(map(_size, (Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), spans_path(prefix), _rejects_path(prefix))))


def verify(
    prefix: str | Path, tokenizer: Tokenizer | None = None, on_bytes: Callable[[int], None] = lambda count: None
) -> Verified:
    """Read a shard whole, with its spans, its facts and its list of rejects.

    Args:
        prefix: Of the shard.
        tokenizer: That made it; ids of a shard without PREFIX.json are compared with it.
        on_bytes: Told how many bytes have been looked at since it was last told.

    Raises:
        UserError: a file is damaged, or does not fit another one; it names the file and the first byte that is wrong,
            the stretch that it lies in, or what is counted otherwise.
    """
    shards = Shards(prefix)
    unchecked = []
    if shards.facts:
        _verify_facts(shards, tokenizer)
    else:
        unchecked.append(f"checksums and tokenizer ({prefix}.json is missing)")
        if tokenizer is None:
            unchecked.append("whether ids are rows of the vocabulary (--tokenizer is not given)")
    shards.verify(None if tokenizer is None else tokenizer.vocabulary, on_bytes)
    spans = Spans(prefix, shards.num_documents, facts.num_spans(shards))
    spans.verify(shards.lengths, facts.spans_sha256(shards))
    on_bytes(_size(spans_path(prefix)))
    if shards.facts:
        _verify_rejects(prefix, facts.rejected(shards))
        on_bytes(_size(_rejects_path(prefix)))
    return Verified(shards.num_documents, shards.num_tokens, spans.num_spans, tuple(unchecked))


def _verify_facts(shards: Shards, tokenizer: Tokenizer | None) -> None:
    path = f"{shards.prefix}.json"
    digests = "".join(digest for _, digest in shards.checksums)
    if hashlib.sha256(digests.encode()).hexdigest() != shards.bin_sha256:
        raise UserError(f"{path} is damaged: bin_sha256 is not that of its checksums; prepare the shard again")
    if languages := facts.languages(shards):
        for key, count in (("documents", shards.num_documents), ("tokens", shards.num_tokens)):
            if (found := sum(counts[key] for counts in languages.values())) != count:
                raise UserError(
                    f"{path} is damaged: its languages have {found} {key} and the shard has {count}; "
                    "prepare the shard again"
                )
    if tokenizer is not None and shards.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise UserError(
            f"{path} names a tokenizer of sha256 {shards.tokenizer_sha256} and {tokenizer.path} is {tokenizer.sha256}; "
            "name the one that made the shard"
        )


def _rejects_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.rejects.jsonl")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _verify_rejects(prefix: str | Path, rejected: dict[str, int]) -> None:
    """Compare the list of rejects with its counts by reason."""
    path = _rejects_path(prefix)
    found: Counter[str] = Counter()
    place = 0
    try:
        with path.open("rb") as file:
            for line in file:
                found[json.loads(line)["reason"]] += 1
                place += len(line)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; prepare the shard again") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged: the line at byte {place} is no reject; prepare the shard again") from None
    if found != rejected:
        raise UserError(
            f"{path} has {dict(sorted(found.items()))} documents by reason and {prefix}.json has {rejected}; "
            "prepare the shard again"
        )
