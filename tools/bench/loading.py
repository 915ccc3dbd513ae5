"""How fast samples come: tokens a second of the stream and of a rank's loader, planning of best-fit packing, and a
start on a huge corpus.

    python -m megacode.tools.bench.loading FOLDER

The stream and the planning are timed by the process's own CPU seconds, so that other work on the machine does not
count; the loader and the starts by the clock. The huge corpus is 2,419 shards of 2e12 tokens in all: their .bin are
sparse files, which take no room on the disk, their .idx have few and long documents: 2.4 million in all. What
counting the samples of best-fit packing costs, which depends on documents and not on tokens, is measured on another
sparse corpus, of documents of about 1,000 tokens. Each start is a process of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from megacode.data.blocks import BLOCK, RESERVE, count, plan
from megacode.data.shards import HEADER, MAGIC, STRETCH_BYTES, IntArray, ShardWriter
from megacode.data.source import Source
from megacode.data.stream import Packing, TrainStream, open_train
from megacode.data.tokenizer import Tokenizer, train
from megacode.recipe import DataSection, SourceSection
from megacode.tools.output import JsonFile, json_output

LENGTH = 4096
SEED = 1
DOCUMENT_CHARACTERS = 3400
"""About 1,000 tokens."""
LONG_DOCUMENTS = 1000
"""Of each shard of the huge corpus."""
DENSE_DOCUMENTS = 250_000
"""Of each shard of the corpus whose documents are counted."""
GLOBAL_SAMPLES = 1024
FAR_STEP = 400_000
MIXTURE = (("code", 85.0, 4), ("code-nl", 8.0, 1), ("nl", 7.0, 5))
"""Code Llama, Table 1: name, weight, tenths of the files."""


def texts(characters: int) -> Iterator[str]:
    """Python's standard library and what is installed beside it, in pieces of about so many characters; files for 0."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))[:4000]:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            if characters and size >= characters:
                yield "".join(lines)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
        if size:
            yield "".join(lines)


def write_code(folder: Path) -> Tokenizer:
    """A tokenizer, and the shards `pieces` and `files` of real code."""
    path = folder / "tokenizer.model"
    if not path.exists():
        files = list(texts(0))
        train(files[::8], path, 16_000)
    tokenizer = Tokenizer(path)
    for name, characters in (("pieces", DOCUMENT_CHARACTERS), ("files", 0)):
        with ShardWriter(folder / name, tokenizer.vocabulary, tokenizer_sha256=tokenizer.sha256) as writer:
            for text in texts(characters):
                writer.add_document([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos])
    return tokenizer


def stream_figures(
    prefix: Path, tokenizer: Tokenizer, packing: Packing, rate: float, repetitions: int
) -> dict[str, Any]:
    """Tokens a CPU second in each of so many epochs, and what became of their documents."""
    stream = TrainStream(
        [Source(prefix.name, [prefix])], tokenizer, sequence_length=LENGTH, seed=SEED, packing=packing,
        infilling_rate=rate, suffix_first_rate=0.5, document_masks=True,
    )  # fmt: skip
    corpus, per_epoch = stream.corpora[0], stream.cutters[0].per_epoch
    rates, counts = [], Counter[str]()
    stream.sample(0)
    for epoch in range(repetitions):
        started = time.process_time()
        for number in range(per_epoch):
            counts += stream.sample(epoch * per_epoch + number).counts
        rates.append(per_epoch * LENGTH / (time.process_time() - started))
    documents, num_samples = corpus.num_documents * repetitions, per_epoch * repetitions
    return {
        "shard": prefix.name,
        "packing": packing,
        "rate": rate,
        "tokens_per_second": median(rates),
        "spread": [min(rates), max(rates)],
        "documents": corpus.num_documents,
        "mean_length": corpus.num_tokens / corpus.num_documents,
        "samples_per_epoch": per_epoch,
        "samples_of_all_tokens": (corpus.num_tokens - 1) / LENGTH,
        "effective_rate": counts["infilled"] / documents,
        "unfitting": counts["unfitting"] / max(counts["uncut"], 1),
        "irreversible": counts["irreversible"] / max(counts["uncut"], 1),
        "padding": counts["padding"] / (num_samples * (LENGTH + 1)),
    }


def loader_figures(prefix: Path, tokenizer: Tokenizer, rate: float, workers: int, seconds: float) -> dict[str, Any]:
    """Tokens a second that a rank gets from its loader, micro-batches of two sequences; the workers' start apart."""
    from megacode.train.loader import Loader

    stream = TrainStream(
        [Source(prefix.name, [prefix])], tokenizer, sequence_length=LENGTH, seed=SEED, infilling_rate=rate,
        suffix_first_rate=0.5, document_masks=True,
    )  # fmt: skip
    steps = ([[2 * number, 2 * number + 1]] for number in itertools.count())
    began = time.perf_counter()
    with Loader(stream, steps, 1, workers) as loader:
        loader.step()
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            loader.step()
            count += 1
        elapsed = time.perf_counter() - started
    return {
        "rate": rate,
        "workers": workers,
        "first_step_seconds": started - began,
        "tokens_per_second": 2 * LENGTH * count / elapsed,
    }


def usual_lengths(count: int) -> NDArray[np.int32]:
    """Log-normal ones, with a mean of about 1,000 tokens."""
    return np.clip(np.random.default_rng(SEED).lognormal(6.3, 1.1, count), 3, None).astype(np.int32)


def planning_figures(repetitions: int) -> dict[str, Any]:
    """Documents a CPU second of a block of usual lengths."""
    lengths = usual_lengths(BLOCK)
    order = np.random.default_rng(SEED).permutation(BLOCK)

    def rate(work: Callable[[], object]) -> float:
        started = time.process_time()
        work()
        return BLOCK / (time.process_time() - started)

    def measured(work: Callable[[], object]) -> float:
        return median(rate(work) for _ in range(repetitions))

    samples = count(lengths, LENGTH, 0)
    whole = int(lengths.sum(dtype=np.int64)) / LENGTH
    return {
        "mean_length": float(lengths.mean()),
        "plan_documents_per_second": measured(lambda: plan(lengths, LENGTH, RESERVE, order)),
        "count_documents_per_second": measured(lambda: count(lengths, LENGTH, RESERVE)),
        "samples": samples,
        "more_than_concatenated": samples / whole - 1,
        "more_with_reserve": count(lengths, LENGTH, RESERVE) / whole - 1,
    }


def long_lengths(files: int, tokens: int) -> IntArray:
    """Of the documents of one of so many shards that have so many tokens in all."""
    return np.full(LONG_DOCUMENTS, tokens // files // LONG_DOCUMENTS)


def write_sparse(folder: Path, tokenizer: Tokenizer, files: int, lengths: IntArray) -> list[Path]:
    """Sparse shards, all with documents of these lengths."""
    folder.mkdir(exist_ok=True)
    ends, num_documents = np.cumsum(lengths, dtype=np.int64), len(lengths)
    index = HEADER.pack(MAGIC, 1, 8, num_documents, num_documents + 1) + lengths.astype("<i4").tobytes()
    index += (2 * (ends - lengths)).astype("<i8").tobytes()
    index += np.arange(num_documents + 1, dtype="<i8").tobytes()
    num_bytes = 2 * int(ends[-1])
    stretches = [min(STRETCH_BYTES, num_bytes - start) for start in range(0, num_bytes, STRETCH_BYTES)]
    facts = {
        "tokenizer_sha256": tokenizer.sha256, "vocabulary": tokenizer.vocabulary, "source": "sparse",
        "num_documents": num_documents, "num_tokens": num_bytes // 2, "bin_sha256": "0" * 64,
        "checksums": [[size, "0" * 64] for size in stretches],
    }  # fmt: skip
    prefixes = [folder / f"shard_{number:05d}" for number in range(files)]
    for prefix in prefixes:
        with Path(f"{prefix}.bin").open("wb") as file:
            os.truncate(file.fileno(), num_bytes)
        Path(f"{prefix}.idx").write_bytes(index)
        Path(f"{prefix}.json").write_text(json.dumps(facts), encoding="utf-8")
    return prefixes


def huge_data(prefixes: list[str], packing: Packing) -> DataSection:
    """The shards as the sources of Code Llama's mixture."""
    sections, first = [], 0
    for name, weight, tenths in MIXTURE:
        last = len(prefixes) if name == MIXTURE[-1][0] else first + max(1, len(prefixes) * tenths // 10)
        sections.append(SourceSection(name=name, weight=weight, shards=prefixes[first:last]))
        first = last
    return DataSection(train=sections, packing=packing)


def peak_bytes() -> int:
    """Peak resident memory of this program; getrusage's is at least that of the process which started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def start(folder: Path, corpus: str, packing: Packing, step: int) -> None:
    """What a start's process does: prints its figures as JSON."""
    tokenizer = Tokenizer(folder / "tokenizer.model")
    prefixes = sorted(str(path.with_suffix("")) for path in (folder / corpus).glob("*.idx"))
    before = peak_bytes()
    started, cpu = time.perf_counter(), time.process_time()
    stream = open_train(huge_data(prefixes, packing), tokenizer, LENGTH, SEED)
    opened, cpu = time.perf_counter(), time.process_time() - cpu
    for micro_batch in range(2):
        first = step * GLOBAL_SAMPLES + 8 * micro_batch
        stream.micro_batch(range(first, first + 8))
    figures = {
        "open_seconds": opened - started,
        "open_cpu_seconds": cpu,
        "first_samples_seconds": time.perf_counter() - opened,
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": before,
        "open_files": len(os.listdir("/proc/self/fd")),
    }
    steady = time.perf_counter()
    for number in range(500):
        stream.sample(first + 100 + number)
    figures["tokens_per_second"] = 500 * LENGTH / (time.perf_counter() - steady)
    print(json.dumps(figures))


def start_figures(folder: Path, corpus: str, packing: Packing, step: int) -> dict[str, Any]:
    """Of a start in a process of its own, whose imports do not count."""
    (row,) = starts_at_once(folder, corpus, packing, step, 1)
    return row


def starts_at_once(folder: Path, corpus: str, packing: Packing, step: int, processes: int) -> list[dict[str, Any]]:
    """Of so many starts at the same time."""
    code = (
        "from pathlib import Path; from megacode.tools.bench.loading import start; "
        f"start(Path({str(folder)!r}), {corpus!r}, {packing!r}, {step})"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
               for _ in range(processes)]  # fmt: skip
    rows = []
    for process in started:
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"a start ended with {process.returncode}")
        rows.append({"packing": packing, "step": step, **json.loads(output.splitlines()[-1])})
    return rows


def counting_figures(folder: Path, tokenizer: Tokenizer, documents: int, processes: int) -> dict[str, Any]:
    """First starts with best-fit packing, which count samples, and second ones, which find them counted."""
    files = max(3, documents // DENSE_DOCUMENTS)
    lengths = usual_lengths(documents // files)
    prefixes = write_sparse(folder / "dense", tokenizer, files, lengths)
    try:
        first = start_figures(folder, "dense", "best_fit", 0)
        second = start_figures(folder, "dense", "best_fit", 0)
        for path in (folder / "dense").glob("*.best_fit_*"):
            path.unlink()
        return {
            "documents": len(lengths) * len(prefixes),
            "files": files,
            "tokens": int(lengths.sum(dtype=np.int64)) * len(prefixes),
            "first": first,
            "second": second,
            "first_at_once": starts_at_once(folder, "dense", "best_fit", 0, processes),
        }
    finally:
        shutil.rmtree(folder / "dense")


def print_counting(counting: dict[str, Any]) -> None:
    """As a table."""
    print(
        f"best_fit starts on {counting['files']:,} files, {counting['documents']:,} documents, "
        f"{counting['tokens']:,} tokens: seconds to open, of CPU, peak MiB"
    )
    rows = (("first", counting["first"]), *(("first, at once", row) for row in counting["first_at_once"]))
    for name, row in (*rows, ("second", counting["second"])):
        print(
            f"  {name:14} {row['open_seconds']:6.2f} {row['open_cpu_seconds']:6.2f} {row['peak_bytes'] / 2**20:6.0f}; "
            f"{counting['documents'] / row['open_cpu_seconds'] / 1e6:.1f} million documents a CPU second"
        )


def main(
    folder: Annotated[Path, typer.Argument(help="What is written goes here; the shards of it are removed at the end.")],
    files: Annotated[int, typer.Option(min=3, help="Shards of the huge corpus.")] = 2419,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the huge corpus.")] = 2 * 10**12,
    documents: Annotated[int, typer.Option(min=3, help="Documents of the corpus that is counted.")] = 20_000_000,
    repetitions: Annotated[
        int, typer.Option(min=1, help="Of each measurement, of the stream an epoch; the median is told.")
    ] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="Of each measurement of the loader.")] = 5.0,
    json_file: JsonFile = None,
) -> None:
    """Tokens a second of the training stream, documents a second of packing, and starts on a huge corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    with json_output(json_file) as write_json:
        tokenizer = write_code(folder)
        cases: list[tuple[Packing, float]] = [
            (packing, rate) for rate in (0.0, 0.9) for packing in ("concatenate", "best_fit")
        ]
        streams = [
            stream_figures(folder / name, tokenizer, packing, rate, repetitions)
            for name in ("pieces", "files")
            for packing, rate in cases
        ]
        print("stream of one core: million tokens/s, share of documents infilled, padding, samples over all tokens")
        for row in streams:
            more = row["samples_per_epoch"] / row["samples_of_all_tokens"] - 1
            print(
                f"  {row['shard']:7} {row['packing']:12} rate {row['rate']:.1f}: {row['tokens_per_second'] / 1e6:7.2f}"
                f"  {row['effective_rate']:7.2%}  {row['padding']:7.3%}  {more:+.3%}"
            )
        loaders = [loader_figures(folder / "pieces", tokenizer, rate, workers, seconds)
                   for rate in (0.0, 0.9) for workers in (0, 1)]  # fmt: skip
        print("loader of one rank: million tokens/s, seconds to its first micro-batch")
        for row in loaders:
            print(
                f"  rate {row['rate']:.1f}, {row['workers']} workers: {row['tokens_per_second'] / 1e6:7.2f}"
                f"  {row['first_step_seconds']:6.2f}"
            )
        planning = planning_figures(repetitions)
        print(
            f"best fit: {planning['plan_documents_per_second'] / 1e6:.1f} million documents/s planned, "
            f"{planning['count_documents_per_second'] / 1e6:.1f} counted; {planning['more_than_concatenated']:+.3%} "
            f"samples over concatenation, {planning['more_with_reserve']:+.3%} with the reserve of infilling"
        )
        write_sparse(folder / "huge", tokenizer, files, long_lengths(files, tokens))
        starts = [start_figures(folder, "huge", packing, step) for packing in ("concatenate", "best_fit")
                  for step in (0, FAR_STEP)]  # fmt: skip
        print(
            f"starts on {files:,} files, {files * LONG_DOCUMENTS:,} documents, {tokens:,} tokens: "
            "seconds to open, to 16 samples; peak MiB, of it before"
        )
        for row in starts:
            print(
                f"  {row['packing']:12} step {row['step']:7,}: {row['open_seconds']:6.2f} "
                f"{row['first_samples_seconds']:6.3f} {row['peak_bytes'] / 2**20:6.0f} "
                f"{row['peak_bytes_before'] / 2**20:6.0f}; {row['open_files']} open files, then "
                f"{row['tokens_per_second'] / 1e6:.2f} million tokens/s"
            )
        shutil.rmtree(folder / "huge")
        counting = counting_figures(folder, tokenizer, documents, processes=2)
        print_counting(counting)
        figures = {"streams": streams, "loaders": loaders, "planning": planning, "starts": starts}
        write_json({**figures, "counting": counting})


if __name__ == "__main__":
    typer.run(main)
