"""`python -m megacode.tools.bench.prepare`: JSON lines to shards, beside SentencePiece alone and datatrove."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from megacode.data.preparing.corpus import Corpus
from megacode.data.shards import Shards
from megacode.data.tokenizer import Tokenizer, train
from megacode.errors import UserError
from megacode.tools.bench.processes import Figures, command_line
from megacode.tools.output import JsonFile, json_output

NUM_PIECES = 32000
TOKENIZER_BYTES = 30 << 20
_LOOK_SECONDS = 0.02
PEERS = "megacode.tools.bench.prepare_peers"
_THREADS = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""A worker is one core for all contestants."""


@dataclass
class Row:
    """A contestant on a corpus."""

    name: str
    workers: int
    megabytes: float
    """Text of the corpus in UTF-8."""
    seconds: list[float] = field(default_factory=list)
    """Of each round, start of the processes included."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Of all its processes together: what a busy machine disturbs less."""
    peak_bytes: int = 0
    """Resident memory of its largest process."""
    tokens: int = 0
    """Without those that frame a document."""

    @property
    def per_core(self) -> Figures:
        """Text per second and worker, in MB: median, lowest, highest."""
        rates = [self.megabytes / seconds / self.workers for seconds in self.seconds]
        return median(rates), min(rates), max(rates)

    @property
    def per_cpu_second(self) -> Figures:
        """MB of text a second of a core's work: median, lowest, highest."""
        rates = [self.megabytes / seconds for seconds in self.cpu_seconds]
        return median(rates), min(rates), max(rates)


def sources() -> Iterator[str]:
    """Python files of this machine, over and over; from the second time on each says which time it is."""
    folders = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib")]
    for turn in range(1_000_000):
        for document in Corpus(folders, exclude=("__pycache__",)).documents():
            yield document.text + (f"# {turn}\n" if turn else "")


def write_corpus(path: Path, megabytes: int) -> float:
    """So many MB of text as JSON lines in two files, PATH/0.jsonl and 1.jsonl. Returns how many they are."""
    path.mkdir()
    num_bytes = 0
    with (path / "0.jsonl").open("w") as first, (path / "1.jsonl").open("w") as second:
        for text in sources():
            num_bytes += len(text.encode())
            (first if num_bytes < megabytes * 500_000 else second).write(json.dumps({"text": text}) + "\n")
            if num_bytes >= megabytes * 1_000_000:
                return num_bytes / 1e6
    raise AssertionError


def write_tokenizer(path: Path) -> None:
    """A tokenizer of Llama's size."""

    def texts() -> Iterator[str]:
        num_bytes = 0
        for text in sources():
            yield text
            num_bytes += len(text)
            if num_bytes > TOKENIZER_BYTES:
                return

    train(texts(), path, NUM_PIECES)


def run(row: Row, command: Sequence[str], folder: Path) -> str:
    """Run a contestant once, and note its time and memory; the last line that it printed."""
    said = folder / "said"
    started, used = time.monotonic(), dict[int, float]()
    with said.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **_THREADS})
        while process.poll() is None:
            for pid in family(process.pid):
                row.peak_bytes = max(row.peak_bytes, peak_bytes(pid))
                used[pid] = max(used.get(pid, 0.0), cpu_seconds(pid))
            time.sleep(_LOOK_SECONDS)
    row.seconds.append(time.monotonic() - started)
    row.cpu_seconds.append(sum(used.values()))
    text = said.read_text()
    if process.returncode:
        raise RuntimeError(f"{row.name} ended with {process.returncode}: {text.strip()[-500:]}")
    return text.strip().split("\n")[-1]


def cpu_seconds(pid: int) -> float:
    """What a process has used. Not from getrusage: that leaves out those that nobody waited for."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    with contextlib.suppress(OSError):  # it has ended
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from family(int(child))


def peak_bytes(pid: int) -> int:
    """The most resident memory that a process has had. Not from getrusage: that begins with what its parent had."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def round_of(row: Row, corpus: Path, tokenizer: Path, folder: Path) -> None:
    """One turn of a contestant."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", PEERS, row.name, str(row.workers), str(tokenizer), str(corpus), scratch]
        said = run(row, command, folder)
        if row.name == "megacode":
            shards = Shards(Path(scratch, "out"))
            row.tokens = shards.num_tokens - 2 * shards.num_documents
        else:
            row.tokens = int(said)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as Markdown."""
    yield "Median (lowest, highest) of the rounds."
    yield ""
    yield "| | workers | MB of text | MB/s per worker | MB per CPU second | largest process, MB |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in rows:
        rates = (f"{middle:.1f} ({low:.1f}, {high:.1f})" for middle, low, high in (row.per_core, row.per_cpu_second))
        memory = f"{row.peak_bytes / 1e6:.0f}"
        yield f"| {' | '.join([row.name, str(row.workers), f'{row.megabytes:.0f}', *rates, memory])} |"


def check(rows: Sequence[Row]) -> None:
    """All contestants must have made the same tokens of the same text.

    Raises:
        RuntimeError: one has made others.
    """
    for row in rows:
        first = next(one for one in rows if one.megabytes == row.megabytes)
        if row.tokens != first.tokens:
            raise RuntimeError(f"{row.name} makes {row.tokens} tokens of the text, and {first.name} {first.tokens}")


def result(engine: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What is written for programs."""
    figures = [{"per_core": row.per_core, "per_cpu_second": row.per_cpu_second} for row in rows]
    return {"engine": engine, "rows": [asdict(row) | own for row, own in zip(rows, figures, strict=True)]}


def main(
    small: Annotated[int, typer.Option(min=1, help="MB of text that all contestants tokenize.")] = 50,
    large: Annotated[int, typer.Option(min=0, help="MB of text that megacode tokenizes besides; 0 for none.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contestant.")] = 3,
    tokenizer: Annotated[Path | None, typer.Option(help="SentencePiece model; left out, one is trained.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the files go for a while; left out, $TMPDIR.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure `megacode prepare` beside SentencePiece alone and datatrove's MegatronDocumentTokenizer, in turns.

    The text is Python files of this machine. SentencePiece reads the lines and writes nothing. datatrove is in the
    extra `data`. Times include the start of all processes.

    Example: python -m megacode.tools.bench.prepare --large 0 --rounds 1
    """
    if small == large:
        raise UserError("--small and --large are the same; give two sizes")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with json_output(json_file) as write, tempfile.TemporaryDirectory(dir=folder) as scratch:
        model = tokenizer or Path(scratch, "tokenizer.model")
        if tokenizer is None:
            write_tokenizer(model)
        engine = Tokenizer(model).engine.name
        corpora = {size: Path(scratch, str(size)) for size in (small, large) if size}
        amounts = {size: write_corpus(path, size) for size, path in corpora.items()}
        contestants = [("megacode", 1), ("megacode", 2), ("sentencepiece", 1), ("datatrove", 1), ("datatrove", 2)]
        rows = {(name, workers, small): Row(name, workers, amounts[small]) for name, workers in contestants}
        rows |= {("megacode", n, large): Row("megacode", n, amounts[large]) for n in (1, 2) if large}
        found = list(rows.values())
        for number in range(rounds):
            for (_, _, size), row in rows.items():
                round_of(row, corpora[size], model, Path(scratch))
            check(found)
            write(result(engine, found), whole=number == rounds - 1)
        print("\n".join([f"megacode's engine: {engine}", *table(found)]))


if __name__ == "__main__":
    command_line(main)
