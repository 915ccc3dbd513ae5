"""A shard that was looked at, as lines of text."""

import math
import shutil
from collections.abc import Iterator

from megacode.data import facts
from megacode.data.lengths import Amount
from megacode.tools.data.inspect import Found, bytes_per_token, classes
from megacode.tools.data.painting import in_colours, legend, paint, visible

NEAREST, FARTHEST = 20, 60
"""Columns of the longest bar."""


def text(found: Found) -> Iterator[str]:
    """The lines that are printed."""
    for part in (_counts, _plot, _fitting, _tables):
        yield from map(visible, part(found))  # PREFIX.json may come from anyone
    yield from _documents(found)


def _counts(found: Found) -> Iterator[str]:
    shards, lengths = found.shards, found.lengths
    counts = f"{shards.num_documents:,} documents, {shards.num_tokens:,} tokens"
    yield f"{shards.prefix}: {counts} of {shards.itemsize} bytes"
    if (ratio := bytes_per_token(shards)) is not None:
        yield f"{ratio:.3f} bytes of text a token"
    if found.num_spans:
        yield f"{found.num_spans:,} stretches of tokens without loss"
    if source := shards.facts.get("source"):
        yield f"made of {source}"
    yield f"tokenizer: {found.tokenizer}"
    mean = shards.num_tokens / shards.num_documents
    yield f"\nlengths in tokens: {lengths.shortest:,} to {lengths.longest:,}, mean {mean:,.1f}"


def _plot(found: Found) -> Iterator[str]:
    """A bar of documents for each class of lengths."""
    lengths, sample = found.lengths, found.question.sequence_length + 1
    width = min(FARTHEST, max(NEAREST, shutil.get_terminal_size().columns - 50))
    most = int(lengths.documents.max())
    for (low, high), documents, tokens in classes(lengths):
        mark = f"  < a sample of {sample:,}" if low <= sample <= high else ""
        share, of_tokens = documents / found.shards.num_documents, tokens / max(1, found.shards.num_tokens)
        bar = _bar(width * documents / most)
        yield f"{low:>13,} {bar:<{width}} {share:>7.2%} of documents {of_tokens:>7.2%} of tokens{mark}"


def _bar(columns: float) -> str:
    """A bar in eighths of a column; what there is of is seen."""
    eighths = math.ceil(8 * columns)
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def _fitting(found: Found) -> Iterator[str]:
    """How much is too long for a sample, and how much could be infilled."""
    question, lengths, shards = found.question, found.lengths, found.shards
    sample, rate = question.sequence_length + 1, question.infilling_rate

    def row(name: str, amount: Amount, rates: tuple[float, ...]) -> str:
        documents, tokens = amount.documents / shards.num_documents, amount.tokens / max(1, shards.num_tokens)
        return f"{name:<34}" + "".join(f" {each * documents:>10.2%} {each * tokens:>10.2%}" for each in rates)

    yield f"\n{'':<34} {'documents':>10} {'tokens':>10} {f'infilled at rate {rate:g}':>21}"
    yield row(f"longer than a sample of {sample:,}", lengths.too_long, (1,))
    for packing, amount in lengths.uncut.items():
        yield row(f"uncut with packing {packing}", amount, (1, rate))
    if tried := found.tried["uncut"]:
        what = ", ".join(f"{found.tried[key]} {key}" for key in ("infilled", "irreversible", "unfitting", "spanned"))
        yield f"of {tried} documents that a sample holds, tried: {what}"


def _tables(found: Found) -> Iterator[str]:
    """Languages, and what was left out."""
    languages, rejected = facts.languages(found.shards), facts.rejected(found.shards)
    if languages:
        yield f"\n{'language':<16} {'documents':>13} {'tokens':>17} {'share':>7} {'bytes a token':>14}"
    for name, counts in sorted(languages.items(), key=lambda item: -item[1]["tokens"]):
        share, ratio = counts["tokens"] / max(1, found.shards.num_tokens), counts["bytes"] / max(1, counts["tokens"])
        yield f"{name:<16} {counts['documents']:>13,} {counts['tokens']:>17,} {share:>7.2%} {ratio:>14.3f}"
    if rejected:
        yield f"\nleft out: {sum(rejected.values()):,} documents ({found.shards.prefix}.rejects.jsonl)"
    for reason, count in sorted(rejected.items(), key=lambda item: -item[1]):
        yield f"{count:>13,} {reason}"


def _documents(found: Found) -> Iterator[str]:
    """Some of them, and some as infilling documents."""
    colours = in_colours()
    for shown in found.documents:
        yield f"\ndocument {shown.document} ({shown.num_tokens:,} tokens)"
        yield paint(shown.runs, colours)
    if found.infilled and colours:
        yield f"\n{legend()}"
    for shown in found.infilled:
        middle = f"characters {shown.cuts[0]}..{shown.cuts[1]}" if shown.cuts else ""
        yield f"\ndocument {shown.document} infilled ({shown.kind}, {shown.num_tokens:,} tokens, middle: {middle})"
        yield paint(shown.runs, colours)
