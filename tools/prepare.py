"""megacode prepare: source files to shards."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from megacode.data.corpus import EXCLUDE, SUFFIXES, Corpus
from megacode.errors import UserError

VALID_FRACTION = 0.05

Inputs = Annotated[list[Path], typer.Argument(help="Files (.jsonl and .jsonl.gz hold a document a line) or folders.")]
Suffixes = Annotated[
    list[str] | None,
    typer.Option(help=f"End of the file names to take from folders; repeatable. Default: {' '.join(SUFFIXES)}"),
]
Excludes = Annotated[
    list[str] | None,
    typer.Option(help=f"Folder name to leave out; repeatable, replaces the default: {' '.join(EXCLUDE)}"),
]
TextKey = Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")]


def prepare(
    inputs: Inputs,
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece model, from `megacode tokenizer train`.")],
    output: Annotated[Path, typer.Option(help="Prefix of the training shard: PREFIX.bin, .idx and .json.")],
    valid: Annotated[Path | None, typer.Option(help="Prefix of a validation shard; left out, there is none.")] = None,
    valid_fraction: Annotated[
        float | None, typer.Option(help="Share of the documents that go to --valid; left out, 0.05.")
    ] = None,
    suffix: Suffixes = None,
    exclude: Excludes = None,
    text_key: TextKey = "text",
) -> None:
    """Turn source files into shards that training reads.

    Example: megacode prepare src/ --tokenizer tokenizer.model --output data/train --valid data/valid
    """
    from megacode.data.prepare import prepare as prepare_shards
    from megacode.data.tokenizer import Tokenizer

    if valid is None and valid_fraction is not None:
        raise UserError("--valid-fraction needs --valid PREFIX, where these documents go")
    for prefix in (output, valid):
        if prefix is not None and prefix.with_name(prefix.name + ".bin").exists():
            raise UserError(f"{prefix}.bin is there already; remove it with its .idx and .json, or name another prefix")
    model = Tokenizer(tokenizer)
    corpus = Corpus(inputs, suffixes=suffix or SUFFIXES, exclude=exclude or EXCLUDE, text_key=text_key)
    with reading_bar("Tokenizing", corpus) as on_document:
        summary = prepare_shards(
            corpus,
            model,
            output,
            valid=valid,
            valid_fraction=VALID_FRACTION if valid_fraction is None else valid_fraction,
            on_document=on_document,
        )
    typer.echo(f"{output}: {summary.num_documents:,} documents, {summary.num_tokens:,} tokens")
    if valid is not None:
        typer.echo(f"{valid}: {summary.num_valid_documents:,} documents, {summary.num_valid_tokens:,} tokens")
    if summary.num_undecodable or summary.num_empty:
        typer.echo(f"skipped: {summary.num_undecodable:,} that are not UTF-8, {summary.num_empty:,} empty")


@contextmanager
def reading_bar(description: str, corpus: Corpus) -> Iterator[Callable[[], None]]:
    """A progress bar over a corpus's bytes, to be told after each document; silent where stdout is no terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(description, total=corpus.num_bytes)
        yield lambda: progress.update(task, completed=corpus.num_bytes_read)
