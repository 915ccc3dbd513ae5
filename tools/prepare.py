"""megacode prepare: source files to shards."""

import difflib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from megacode.data.preparing.corpus import EXCLUDE, SUFFIXES, Corpus
from megacode.data.preparing.filters import MAX_DOCUMENT_BYTES, Filters
from megacode.data.preparing.languages import NAMES
from megacode.data.preparing.readers import LINES, PARQUET, Fields
from megacode.errors import UserError
from megacode.tools.executors import Duplicates, Executor, check_executor, on_cluster, on_this_machine, tell_skipped

VALID_FRACTION = 0.05


class Rules(StrEnum):
    """Sets of rules for --filter."""

    CODE = "code"


Inputs = Annotated[
    list[Path],
    typer.Argument(
        help="Folders and files; .jsonl, .ndjson (also .gz, .zst) and .parquet hold a document a line or row."
    ),
]
Suffixes = Annotated[
    list[str] | None,
    typer.Option(
        help=f"End of the file names to take from folders; repeatable. Default: those of --language, or {SUFFIXES[0]}"
    ),
]
Excludes = Annotated[
    list[str] | None,
    typer.Option(help=f"Folder name to leave out; repeatable, replaces the default: {' '.join(EXCLUDE)}"),
]
TextField = Annotated[
    str | None, typer.Option(help="Field of a JSON line, or column, that holds the text; left out, text.")
]
Dedup = Annotated[
    Duplicates | None,
    typer.Option(help="Leave out all but the first of equal documents, or also of nearly equal ones (MinHash)."),
]
Decontaminate = Annotated[
    list[Path] | None,
    typer.Option(help="Leave out documents with text of this benchmark (.jsonl, .parquet or text); repeatable."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes, one for each core if left out; tasks at once on SLURM.")
]


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
    text_field: TextField = None,
    language_field: Annotated[
        str | None, typer.Option(help="Field, or column, that holds the language; files tell it by their names.")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Take documents of this language only (python, c++, ...); repeatable.")
    ] = None,
    filter: Annotated[
        Rules | None, typer.Option(help="code: DeepSeek-Coder's rules against files that are not code.")
    ] = None,
    min_bytes: Annotated[int, typer.Option(min=0, help="Leave out smaller documents.")] = 0,
    max_bytes: Annotated[
        int, typer.Option(min=1, max=MAX_DOCUMENT_BYTES, help="Leave out larger documents.")
    ] = MAX_DOCUMENT_BYTES,
    dedup: Dedup = None,
    decontaminate: Decontaminate = None,
    workers: Workers = None,
    executor: Annotated[Executor, typer.Option(help="Work here, or send jobs to a cluster.")] = Executor.LOCAL,
    partition: Annotated[str | None, typer.Option(help="SLURM's partition, if not the default one.")] = None,
    time: Annotated[str | None, typer.Option(help="SLURM's time limit of a task, as for sbatch.")] = None,
    memory_gb: Annotated[int | None, typer.Option(min=1, help="Memory of a task on SLURM; left out, 4.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end of jobs on SLURM.")] = False,
) -> None:
    """Turn source files into shards that training reads.

    What is left out is in PREFIX.rejects.jsonl, with the reason. An interrupted command, given again, goes on.

    Example: megacode prepare src/ --tokenizer tokenizer.model --output data/train --valid data/valid
    """
    from megacode.data.preparing.prepare import plan

    check_executor(executor, {"--partition": partition, "--time": time, "--memory-gb": memory_gb, "--wait": wait})
    if valid is None and valid_fraction is not None:
        raise UserError("--valid-fraction needs --valid PREFIX, where these documents go")
    if min_bytes > max_bytes:
        raise UserError(f"--min-bytes {min_bytes} is above --max-bytes {max_bytes}; no document is both")
    languages = tuple(name.lower() for name in language or ())
    if language_field is None:
        _check_languages(languages)
    corpus = Corpus(
        inputs,
        suffixes=tuple(suffix or ()),
        exclude=tuple(exclude or EXCLUDE),
        fields=fields_of(inputs, text_field, language_field),
        filters=Filters(languages, min_bytes, max_bytes, code=filter == Rules.CODE),
    )
    fraction = VALID_FRACTION if valid_fraction is None else valid_fraction
    job = plan(
        *(corpus, tokenizer, output),
        valid=valid,
        valid_fraction=fraction,
        dedup=dedup,
        decontaminate=decontaminate or (),
    )
    if decontaminate and job.planned:
        tell_skipped(job)
    if executor == Executor.SLURM:
        summary = on_cluster(job, partition, time, memory_gb, workers, wait)
    else:
        summary = on_this_machine(job, workers)
    if summary is not None:
        _tell(summary, output, valid)


def fields_of(inputs: list[Path], text_field: str | None, language_field: str | None = None) -> Fields:
    """The fields of the records.

    Raises:
        UserError: one is named, and no input has records.
    """
    named = {"--text-field": text_field, "--language-field": language_field}
    for option, name in named.items():
        if name is not None and not any(path.is_dir() or path.name.endswith((*LINES, PARQUET)) for path in inputs):
            raise UserError(
                f"{option} {name}: no input has fields; files of JSON lines are told by their name, .jsonl or .ndjson"
            )
    return Fields("text" if text_field is None else text_field, language_field)


def _check_languages(languages: tuple[str, ...]) -> None:
    for name in languages:
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, 1)
            raise UserError(
                f"--language {name} is none that a file's name can tell; "
                + (f"did you mean {close[0]}?" if close else "names are GitHub Linguist's, such as python, c++, c#")
            )


def _tell(summary: dict[str, dict[str, Any]], output: Path, valid: Path | None) -> None:
    for side, prefix in (("train", output), ("valid", valid)):
        if prefix is not None:
            typer.echo(f"{prefix}: {_counts(summary[side])}")
    if rejected := summary["train"]["rejected"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
        typer.echo(f"left out: {reasons} ({output}.rejects.jsonl)")


def _counts(facts: dict[str, Any]) -> str:
    engine = facts["engine"]
    why = " (`megacode tokenizer check` says why no faster one)" if "sentencepiece" in engine else ""
    return f"{facts['num_documents']:,} documents, {facts['num_tokens']:,} tokens by {engine}{why}"


@contextmanager
def reading_bar(description: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes of inputs, to be told how many more are read; silent where stdout is no terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(description, total=num_bytes)
        yield lambda count: progress.advance(task, count)
