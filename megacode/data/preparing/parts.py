"""A unit becomes a part, and parts become the shards. Whoever runs which unit, and when: the bytes are the same.

A part is a folder, PREFIX.parts/UNIT, that gets this name when it is whole: shards `train` and, where there is a
validation shard, `valid`; rejects.jsonl; and unit.json with what merging needs to know besides.
"""

import errno
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megacode.data.durable import rename, sync
from megacode.data.joints import is_unbroken
from megacode.data.preparing.corpus import is_valid
from megacode.data.preparing.job import Job, documents
from megacode.data.preparing.readers import LINES, Reject, Segments, Watch, encodable
from megacode.data.preparing.streams import OnBytes
from megacode.data.shards import Shards, ShardWriter
from megacode.data.spans import SpansWriter, spans_path
from megacode.data.spans import merge as merge_spans
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError

_UNKNOWN = "unknown"
_COUNTS = ("documents", "tokens", "bytes")
_MENDS = {
    "no field": " (--text-field names the field of the text)",
    "other language": " (of lines and rows, --language-field tells the language)",
}
Languages = dict[str, dict[str, int]]
"""Language -> what there is of it."""


def run_unit(job: Job, unit: int, on_bytes: OnBytes = lambda count: None) -> None:
    """Tokenize the documents of a unit into its part; nothing is done where the part is there already.

    Documents that a list of the folder `dropped` names go to the rejects instead.

    Raises:
        UserError: an input cannot be read, or the part cannot be written.
    """
    target = job.part(unit)
    if target.exists():
        on_bytes(sum(piece.num_bytes for piece in job.unit(unit)))
        return
    try:
        folder = Path(tempfile.mkdtemp(suffix=".tmp", prefix=f"{unit:06d}.", dir=job.folder))
        try:
            _write_part(job, unit, folder, on_bytes)
            folder.chmod(job.folder.stat().st_mode)  # mkdtemp's is for its owner alone
            try:
                rename(folder, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another process has run the same unit
                    raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise cannot_write(job, error) from None


def merge(job: Job) -> dict[str, dict[str, Any]]:
    """Make the shards of all parts, in order, and remove the parts.

    Returns:
        For each side (train, valid) what is in its PREFIX.json.

    Raises:
        UserError: a part is missing, a shard would be empty, or cannot be written.
    """
    if (summary := job.finished()) is not None:  # as for a task that is run again, killed before it could say that
        return summary
    missing = next((unit for unit in range(job.num_units) if not job.part(unit).exists()), None)
    if missing is not None:
        raise UserError(f"{job.part(missing)} is missing; run the same command again to make it")
    rejects = Path(f"{job.output}.rejects.jsonl")
    temporary = Path(f"{rejects}.{os.getpid()}.tmp")
    try:
        with ExitStack() as stack:
            writers = _writers(job, job.prefixes, stack)
            with temporary.open("wb") as file:
                stack.callback(temporary.unlink, missing_ok=True)
                rejected = _merge_rejects(job, file)
            for side, writer in writers.items():
                writer.withdraw()  # what a merge that was interrupted left
                _merge_side(job, side, writer)
                writer.facts["job"] = job.identity(side)
                writer.facts["rejected"] = dict(sorted(rejected.items())) if side == "train" else {}
            _refuse_empty(job, writers, rejected)
            _merge_spans(job, writers)
            for writer in writers.values():  # only when all stand may any get its name
                writer.finish()
            rename(temporary, rejects)
            if not rejected:
                rejects.unlink()
    except OSError as error:
        raise cannot_write(job, error) from None
    _remove(job.folder)
    return {side: writer.facts for side, writer in writers.items()}


def frame(
    text: str, segments: Segments | None, tokenizer: Tokenizer
) -> tuple[NDArray[np.int32], list[tuple[int, int]]]:
    """A document's ids, BOS and EOS included, and the spans of them that are not to be learned.

    Segments are encoded each by itself, the first one as a document's beginning. BOS is of the first segment, EOS of
    the last one.
    """
    if segments is None:
        parts = [tokenizer.encode_array(text)]
    else:
        parts = [tokenizer.encode_array(segments[0][0])]
        parts += [np.array(tokenizer.encode_continuation(part), np.int32) for part, _ in segments[1:]]
    ids = np.concatenate([[tokenizer.bos], *parts, [tokenizer.eos]]).astype(np.int32)
    spans: list[tuple[int, int]] = []
    start = 0
    for number, (part, (_, loss)) in enumerate(zip(parts, segments or ((text, True),), strict=True)):
        stop = start + len(part) + (number == 0) + (number == len(parts) - 1)
        if not loss and stop > start:
            joined = bool(spans) and spans[-1][1] == start
            spans = [*spans[:-1], (spans[-1][0], stop)] if joined else [*spans, (start, stop)]
        start = stop
    return ids, spans


def cannot_write(job: Job, error: OSError) -> UserError:
    """What is said when the disk is full, or the like."""
    return UserError(
        f"cannot write {error.filename or job.folder}: {error.strerror}; mend that and give the same command again: "
        f"it goes on from the parts in {job.folder}"
    )


def _write_part(job: Job, unit: int, folder: Path, on_bytes: OnBytes) -> None:
    pieces, dropped = job.unit(unit), _dropped(job, unit)
    tokenizer = job.tokenizer
    watch = Watch(on_bytes)
    rejected: Counter[str] = Counter()
    in_first_piece = 0
    with (folder / "rejects.jsonl").open("w", encoding="utf-8") as file, ExitStack() as stack:

        def reject(reject: Reject) -> None:
            nonlocal in_first_piece
            in_first_piece += watch.piece == 0
            rejected[reject.reason] += 1
            file.write(_line(reject, pieces[watch.piece].input + 1 if len(job.corpus.inputs) > 1 else None))

        watch.on_reject = reject
        prefixes = {side: str(folder / side) for side in job.prefixes}
        writers = _writers(job, prefixes, stack)
        spans = {side: stack.enter_context(SpansWriter(prefixes[side], writers[side].facts)) for side in prefixes}
        languages: dict[str, Languages] = {side: {} for side in prefixes}
        for ordinal, document in enumerate(documents(job, unit, watch)):
            if ordinal in dropped:
                reject(Reject(document.name, document.line, *dropped[ordinal]))
                continue
            if is_unbroken(document.text, tokenizer.model):
                reject(Reject(document.name, document.line, "nowhere to cut"))
                continue
            side = "valid" if job.valid is not None and is_valid(document.key, job.valid_fraction) else "train"
            ids, own = frame(document.text, document.segments, tokenizer)
            writers[side].add_document(ids)
            spans[side].add_document(own)
            counts = (1, len(ids), document.num_bytes)
            _add(languages[side], document.language or _UNKNOWN, dict(zip(_COUNTS, counts, strict=True)))
        for side, writer in writers.items():
            writer.facts |= {"languages": languages[side], "engine": tokenizer.engine.name}
    facts = {"rejected": rejected, "rejects_in_first_piece": in_first_piece, "lines_in_last_piece": watch.num_lines}
    (folder / "unit.json").write_text(json.dumps(facts), encoding="utf-8")


def _writers(job: Job, prefixes: dict[str, str], stack: ExitStack) -> dict[str, ShardWriter]:
    sha256, vocabulary = job.tokenizer_sha256, job.tokenizer.vocabulary
    return {
        side: stack.enter_context(ShardWriter(prefix, vocabulary, tokenizer_sha256=sha256, source=job.source))
        for side, prefix in prefixes.items()
    }


def _dropped(job: Job, unit: int) -> dict[int, tuple[str, str | None]]:
    """Ordinal -> reason, and what was found, of the documents of a unit that are not to be tokenized."""
    reasons: dict[int, tuple[str, str | None]] = {}
    for path in job.dropped(unit):
        with path.open(encoding="utf-8") as file:
            for line in file:
                drop = json.loads(line)
                # A reason is a key of PREFIX.json, and may name a benchmark's file.
                reasons.setdefault(drop["document"], (encodable(drop["reason"]), drop.get("found")))
    return reasons


def _line(reject: Reject, number: int | None) -> str:
    """A line of the list of rejects; `number` is the input's, from 1, where there are several."""
    given = {} if number is None else {"input": number}
    line = {} if reject.line is None else {"line": reject.line}
    found = {} if reject.found is None else {"found": reject.found}
    return json.dumps({**given, "document": reject.name, **line, "reason": reject.reason, **found}) + "\n"


def _merge_side(job: Job, side: str, writer: ShardWriter) -> None:
    """Append all parts of a side."""
    languages: Languages = {}
    engines: set[str] = set()
    for unit in range(job.num_units):
        shards = writer.add_shard(job.part(unit) / side)
        engines.add(shards.facts["engine"])
        for language, counts in shards.facts["languages"].items():
            _add(languages, language, counts)
    writer.facts |= {"languages": dict(sorted(languages.items())), "engine": " ".join(sorted(engines))}


def _merge_spans(job: Job, writers: dict[str, ShardWriter]) -> None:
    """Join the spans of each side; none stay where those of another one cannot be written."""
    try:
        for side, prefix in job.prefixes.items():
            parts = (job.part(unit) / side for unit in range(job.num_units))
            counted = ((part, Shards(part).num_documents) for part in parts)
            merge_spans(counted, prefix, writers[side].facts)
            if spans_path(prefix).exists():
                sync(spans_path(prefix))  # before the shard, whose last file has all that is to stand beside it
    except OSError:
        for prefix in job.prefixes.values():
            spans_path(prefix).unlink(missing_ok=True)
        raise


def _remove(folder: Path) -> None:
    """Remove PREFIX.parts. It loses its name first: parts of which some are gone must not be taken for a job's."""
    doomed = folder.with_name(f"{folder.name}.done.tmp")
    shutil.rmtree(doomed, ignore_errors=True)  # of a removal that was interrupted
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # the shards stand: what cannot be removed is no failure


def _refuse_empty(job: Job, writers: dict[str, ShardWriter], rejected: Counter[str]) -> None:
    for writer in writers.values():
        if not writer.num_documents:
            _remove(job.folder)  # going on with these parts would end the same way
            why = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common()) or "none"
            mend = next((mend for reason, mend in _MENDS.items() if any(reason in each for each in rejected)), "")
            raise UserError(
                f"no document is left for {writer.prefix} (left out: {why}); give more inputs or other options{mend}"
            )


def _merge_rejects(job: Job, file: BinaryIO) -> Counter[str]:
    """Join the lists of rejects, and count them by reason. Line numbers go on where several units read one file."""
    rejected: Counter[str] = Counter()
    before = 0  # lines of the file that earlier units have read
    for unit in range(job.num_units):
        pieces = job.unit(unit)
        facts = json.loads((job.part(unit) / "unit.json").read_text(encoding="utf-8"))
        before = before if pieces[0].start and pieces[0].name.endswith(LINES) else 0
        with (job.part(unit) / "rejects.jsonl").open("rb") as part:
            for line in itertools.islice(part, facts["rejects_in_first_piece"] if before else 0):
                reject = json.loads(line)
                file.write((json.dumps(reject | {"line": reject["line"] + before}) + "\n").encode())
            shutil.copyfileobj(part, file)
        rejected.update(facts["rejected"])
        before = facts["lines_in_last_piece"] + (before if len(pieces) == 1 else 0)
    return rejected


def _add(languages: Languages, language: str, counts: dict[str, int]) -> None:
    sums = languages.setdefault(language, dict.fromkeys(_COUNTS, 0))
    for key in _COUNTS:
        sums[key] += counts[key]
