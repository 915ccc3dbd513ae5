"""From source files to a tokenizer and to shards."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megacode.data.corpus import Corpus, name_hash
from megacode.data.shards import ShardWriter
from megacode.data.tokenizer import Tokenizer, train
from megacode.errors import UserError


@dataclass(frozen=True)
class Summary:
    """What `prepare` did."""

    num_documents: int
    num_tokens: int
    num_valid_documents: int
    num_valid_tokens: int
    num_undecodable: int
    """Documents skipped because they are not UTF-8."""
    num_empty: int
    """Documents skipped because they hold nothing but white space."""


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    valid: str | Path | None = None,
    valid_fraction: float = 0.05,
    on_document: Callable[[], None] = lambda: None,
) -> Summary:
    """Tokenize documents into shards, one sequence BOS ... EOS for each. Memory does not grow with the corpus.

    Args:
        corpus: The documents; shards keep its order.
        tokenizer: Its hash goes into PREFIX.json.
        output: Prefix of the training shard.
        valid: Prefix of the validation shard; left out, there is none.
        valid_fraction: Share of the documents that go there, chosen by a hash of the document's name: a document stays
            on its side when others come or go.
        on_document: Called after each document.

    Raises:
        UserError: an input cannot be read, an output cannot be written, or a shard would be empty.
    """
    if valid is not None and Path(valid) == Path(output):
        raise UserError(f"--output and --valid are both {output}; give two prefixes")
    if not 0 < valid_fraction < 1:
        raise UserError(f"--valid-fraction is {valid_fraction}; give a share between 0 and 1")
    try:
        with ExitStack() as stack:
            writers = [
                stack.enter_context(
                    ShardWriter(prefix, tokenizer.vocabulary, tokenizer_sha256=tokenizer.sha256, source=corpus.source)
                )
                for prefix in (output, valid)
                if prefix is not None
            ]
            for document in corpus.documents():
                ids = [tokenizer.bos, *tokenizer.encode(document.text), tokenizer.eos]
                writers[valid is not None and is_valid(document.name, valid_fraction)].add_document(ids)
                on_document()
            for writer in writers:
                if not writer.num_documents:
                    raise UserError(
                        f"no document is left for {writer.prefix} ({corpus.num_undecodable} that are not UTF-8 and "
                        f"{corpus.num_empty} empty ones were skipped); give more inputs or change --valid-fraction"
                    )
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or output}: {error.strerror}; mend that or move --output"
        ) from None
    counts = [(writer.num_documents, writer.num_tokens) for writer in writers]
    return Summary(*counts[0], *(counts[1] if valid is not None else (0, 0)), corpus.num_undecodable, corpus.num_empty)


def is_valid(name: str, valid_fraction: float) -> bool:
    """Whether a document goes to the validation shard: decided by its name alone."""
    return name_hash(name, "split") < valid_fraction * 2**64


def train_tokenizer(
    corpus: Corpus,
    output: str | Path,
    num_pieces: int = 4096,
    *,
    max_bytes: int = 1 << 30,
    on_document: Callable[[], None] = lambda: None,
) -> None:
    """Train a tokenizer (see `tokenizer.train`) on the first documents of a corpus, in its shuffled order.

    Args:
        corpus: The documents.
        output: The file to write.
        num_pieces: Rows of the base; the file has 16 more.
        max_bytes: How much text to use, since the trainer holds it in memory.
        on_document: Called after each document.

    Raises:
        UserError: an input cannot be read, the output cannot be written, or the text is too little for so many pieces.
    """
    try:
        train(_first(corpus, max_bytes, on_document), output, num_pieces)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; mend that or move --output") from None


def _first(corpus: Corpus, max_bytes: int, on_document: Callable[[], None]) -> Iterator[str]:
    left_bytes = max_bytes
    for document in corpus.documents():
        yield document.text
        on_document()
        left_bytes -= len(document.text.encode())
        if left_bytes <= 0:
            return
