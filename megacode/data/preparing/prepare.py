"""From source files to a tokenizer and to shards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacode.data.preparing.corpus import Corpus
from megacode.data.preparing.job import Job
from megacode.data.preparing.lock import locked
from megacode.data.preparing.parts import cannot_write, merge
from megacode.data.preparing.pool import num_cores, run_units
from megacode.data.preparing.readers import Watch
from megacode.data.preparing.stages import BENCHMARKS, OnStage, check_installed, run_local, stages_of
from megacode.data.preparing.streams import OnBytes
from megacode.data.tokenizer import Tokenizer, train
from megacode.errors import UserError

if TYPE_CHECKING:
    from megacode.data.preparing.decontaminate import Index

Summary = dict[str, dict[str, Any]]
"""Side (train, valid) -> what is in its PREFIX.json."""


def plan(
    corpus: Corpus,
    tokenizer: str | Path,
    output: str | Path,
    *,
    valid: str | Path | None = None,
    valid_fraction: float = 0.05,
    dedup: str | None = None,
    decontaminate: Sequence[str | Path] = (),
) -> Job:
    """Cut the inputs into units and write down the job in PREFIX.parts, or go on with the one that stands there.

    Nothing is written where the shards of this very job stand.

    Args:
        corpus: The documents; shards keep its order.
        tokenizer: The tokenizer's file; its hash goes into PREFIX.json.
        output: Prefix of the training shard.
        valid: Prefix of the validation shard; left out, there is none.
        valid_fraction: Share of the documents that go there, chosen by a hash of the document's key: a file stays on
            its side when others come or go.
        dedup: Leave out duplicates: `exact`, or `near` (which includes exact).
        decontaminate: Benchmark files; documents that hold text of them are left out.

    Raises:
        UserError: an input cannot be read, another shard stands there already, or an output cannot be written.
    """
    if valid is not None and os.path.realpath(valid) == os.path.realpath(output):
        raise UserError(f"--output and --valid are both {os.path.realpath(output)}; give two prefixes")
    if not 0 < valid_fraction < 1:
        raise UserError(f"--valid-fraction is {valid_fraction}; give a share between 0 and 1")
    index, benchmarks = _benchmarks(decontaminate)
    if dedup is not None:
        check_installed("--dedup")
    job = Job(
        corpus=corpus.absolute(),
        source=corpus.source,
        tokenizer_path=os.path.abspath(tokenizer),
        tokenizer_sha256=Tokenizer(tokenizer).sha256,
        output=os.path.abspath(output),
        valid=None if valid is None else os.path.abspath(valid),
        valid_fraction=valid_fraction,
        dedup=dedup,
        benchmarks=benchmarks,
    )
    try:
        job = job.start()
        if index is not None and job.planned:
            index.save(job.folder / BENCHMARKS)
        return job
    except OSError as error:
        raise cannot_write(job, error) from None


def prepare(
    job: Job,
    workers: int | None = None,
    on_bytes: OnBytes = lambda count: None,
    on_stage: OnStage = lambda name, done, tasks: None,
) -> Summary:
    """Find duplicates and benchmarks, then tokenize the other documents into shards, one sequence BOS ... EOS for each.

    The shards' bytes do not depend on the number of workers, nor on whether the work was interrupted. Memory does not
    grow with the corpus.

    Args:
        job: From `plan`.
        workers: Processes; left out, as many as there are cores.
        on_bytes: Told how many bytes of the inputs have been tokenized since it was last told.
        on_stage: Told how many tasks of a stage of de-duplication or decontamination are done, of how many.

    Raises:
        UserError: an input cannot be read, an output cannot be written, or a shard would be empty.
    """
    with locked(job.output):
        if (summary := job.finished()) is not None:
            return summary
        if Job.load(job.folder) != job:
            raise UserError(f"{job.folder} has become another preparation's; remove it, or name another prefix")
        for leftover in job.folder.glob("*.tmp"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)  # what stays goes with the parts
        run_local(stages_of(job), job.folder, workers or num_cores(), on_stage)
        run_units(job, range(job.num_units), workers or num_cores(), on_bytes)
        return merge(job)


def train_tokenizer(
    corpus: Corpus,
    output: str | Path,
    num_pieces: int = 4096,
    *,
    max_bytes: int = 1 << 30,
    on_bytes: OnBytes = lambda count: None,
) -> None:
    """Train a tokenizer (see `tokenizer.train`) on the first documents of a corpus, in its shuffled order.

    Args:
        corpus: The documents.
        output: The file to write.
        num_pieces: Rows of the base; the file has 16 more.
        max_bytes: How much text to use, since the trainer holds it in memory.
        on_bytes: Told how many bytes of the inputs have been read since it was last told.

    Raises:
        UserError: an input cannot be read, the output cannot be written, or the text is too little for so many pieces.
    """
    try:
        train(_first(corpus, max_bytes, on_bytes), output, num_pieces)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; mend that or move --output") from None


def _first(corpus: Corpus, max_bytes: int, on_bytes: OnBytes) -> Iterator[str]:
    left_bytes = max_bytes
    for document in corpus.documents(Watch(on_bytes)):
        yield document.text
        left_bytes -= document.num_bytes
        if left_bytes <= 0:
            return


def _benchmarks(files: Sequence[str | Path]) -> tuple[Index | None, str]:
    """The index of benchmarks, and what they are known by."""
    if not files:
        return None, ""
    check_installed("--decontaminate")
    from megacode.data.preparing.decontaminate import Index, sha256

    known = " ".join(f"{Path(file).name} {sha256(file)}" for file in files)
    return Index.build(files), known
