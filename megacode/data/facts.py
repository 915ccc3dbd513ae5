"""What PREFIX.json says besides counts, checked: who made the shard need not have been this program."""

from typing import Any

from megacode.data.shards import Shards
from megacode.errors import UserError

COUNTS = ("documents", "tokens", "bytes")


def languages(shards: Shards) -> dict[str, dict[str, int]]:
    """Language -> documents, tokens and bytes of text; empty where it does not say.

    Raises:
        UserError: it says what can't be understood.
    """
    values = _mapping(shards, "languages")
    return {name: {key: _count(shards, "languages", counts, key) for key in COUNTS} for name, counts in values.items()}


def rejected(shards: Shards) -> dict[str, int]:
    """Reason -> documents that were left out.

    Raises:
        UserError: it says what can't be understood.
    """
    values = _mapping(shards, "rejected")
    return {reason: _count(shards, "rejected", values, reason) for reason in values}


def num_spans(shards: Shards) -> int | None:
    """Loss spans that PREFIX.spans must have; None where there is no PREFIX.json.

    Raises:
        UserError: it says what can't be understood.
    """
    return _count(shards, "num_spans", {"num_spans": 0} | shards.facts, "num_spans") if shards.facts else None


def spans_sha256(shards: Shards) -> str | None:
    """Of PREFIX.spans; None where there are no loss spans.

    Raises:
        UserError: it says what can't be understood.
    """
    if not num_spans(shards):
        return None
    value = shards.facts.get("spans_sha256")
    if not isinstance(value, str):
        raise _damaged(shards, "spans_sha256")
    return value


def _mapping(shards: Shards, key: str) -> dict[str, Any]:
    value = shards.facts.get(key, {})
    if not isinstance(value, dict):
        raise _damaged(shards, key)
    return value


def _count(shards: Shards, what: str, values: Any, key: str) -> int:
    count = values.get(key) if isinstance(values, dict) else None
    if type(count) is not int or count < 0:
        raise _damaged(shards, what)
    return count


def _damaged(shards: Shards, key: str) -> UserError:
    return UserError(f"{shards.prefix}.json is damaged: its {key} cannot be understood; prepare the shard again")
