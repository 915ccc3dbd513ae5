"""`megacode data verify`: shards, one after the other, whatever is wrong with one of them."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megacode.data.tokenizer import Tokenizer
from megacode.data.verify import num_bytes, verify
from megacode.errors import UserError
from megacode.tools.data.painting import visible
from megacode.tools.prepare import reading_bar


def verify_all(prefixes: Sequence[Path], tokenizer: Path | None) -> list[dict[str, Any]]:
    """Check shards and print a line about each.

    Returns:
        For each shard prefix, what is in it, and `problem`, None where there is none.

    Raises:
        UserError: the tokenizer can't be read.
    """
    known = None if tokenizer is None else Tokenizer(tokenizer)
    results, sizes = [], [num_bytes(prefix) for prefix in prefixes]
    begun, read = time.monotonic(), 0
    with reading_bar("Verifying", sum(sizes)) as advance:

        def on_bytes(count: int) -> None:
            nonlocal read
            read += count
            advance(count)

        for prefix, size in zip(prefixes, sizes, strict=True):
            result: dict[str, Any] = {"prefix": str(prefix), "num_bytes": size, "problem": None}
            try:
                result |= asdict(verify(prefix, known, on_bytes))
                print(f"{prefix}: right: {_counts(result)}")
                for what in result["unchecked"]:
                    print(f"{prefix}: not checked: {what}")
            except UserError as error:
                result["problem"] = str(error)
                print(visible(f"{prefix}: WRONG: {error}"))
            results.append(result)
    seconds, bad = time.monotonic() - begun, sum(result["problem"] is not None for result in results)
    print(
        f"{len(results) - bad} of {len(results)} shards are right; {read / 1e6:,.1f} MB in {seconds:.1f} s, "
        f"{read / 1e6 / seconds:,.0f} MB/s"
    )
    return results


def _counts(result: dict[str, Any]) -> str:
    spans = f", {result['num_spans']:,} loss spans" if result["num_spans"] else ""
    return f"{result['num_documents']:,} documents, {result['num_tokens']:,} tokens{spans}"
