"""`python -m megacode.tools.bench.dedup`: what is found of duplicates and benchmarks made by hand, and how fast."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from megacode.data.preparing.corpus import Corpus
from megacode.data.preparing.job import Job, documents
from megacode.data.preparing.prepare import plan
from megacode.data.preparing.stages import NEAR, Stage, check_installed, run_local, stages_of
from megacode.data.tokenizer import train
from megacode.tools.bench.prepare import sources
from megacode.tools.bench.processes import command_line
from megacode.tools.output import JsonFile, json_output

SHORTEST = 300
SIMILAR = (0.8, 0.72, 0.5)
"""Jaccard similarities of runs of 5 words: surely found, the threshold, and what is hardly a duplicate any more."""
_PROBLEM = '''
def {name}(values: List[float], threshold: float) -> bool:
    """ Tell whether in the given list of {topic} any two are closer to each other than the threshold for {name}.
    >>> {name}([1.0, 2.8, {number}, 4.0, 5.0, 2.0], 0.3)
    True
    """
'''


@dataclass
class Made:
    """A corpus with its answers: texts, and the numbers of those of each kind (unique, near, exact, contaminated)."""

    texts: list[str]
    kinds: dict[str, range]
    problems: list[str]

    @property
    def megabytes(self) -> float:
        return sum(len(text.encode()) for text in self.texts) / 1e6


def make(unique: int, near: int, exact: int, contaminated: int) -> Made:
    """Python files of this machine; copies of them, of which some have 1 % of words changed; files with problems."""
    rng = random.Random(0)
    found = islice((text for text in sources() if len(text) > SHORTEST), unique + contaminated)
    texts = list(found)
    originals, others = texts[:unique], texts[unique:]
    problems = [problem(rng, number) for number in range(contaminated)]
    copies = rng.sample(originals, near + exact)
    changes = [changed(text, rng) for text in copies[:near]]
    dirty = [pasted(text, one, rng) for text, one in zip(others, problems, strict=True)]
    texts = [*originals, *changes, *copies[near:], *dirty]
    bounds = np.cumsum([0, unique, near, exact, contaminated]).tolist()
    kinds = zip(("unique", "near", "exact", "contaminated"), map(range, bounds[:-1], bounds[1:]), strict=True)
    return Made(texts, dict(kinds), problems)


def problem(rng: random.Random, number: int) -> str:
    """An invented problem of the kind of HumanEval."""
    letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8))
    return _PROBLEM.format(name=f"find_{letters}", topic=f"{letters[:4]} readings", number=f"{number}.5")


def changed(text: str, rng: random.Random) -> str:
    """A copy in which one word in a hundred is another."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), max(len(words) // 100, 1)):
        words[place] = f"changed{rng.randrange(10**6)}"
    return " ".join(words)


def pasted(text: str, one: str, rng: random.Random) -> str:
    """A text with a problem between two of its lines."""
    lines = text.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    return "".join([*lines[:place], one, *lines[place:]])


def start(made: Made, folder: Path) -> Job:
    """A job over the corpus, cut into as many units as its size makes."""
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in made.texts))
    (folder / "problems.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in made.problems))
    train(iter(made.texts[:20]), folder / "tokenizer.model", 1000)
    corpus = Corpus([folder / "corpus.jsonl"])
    files = [folder / "problems.jsonl"]
    return plan(corpus, folder / "tokenizer.model", folder / "out", dedup=NEAR, decontaminate=files)


def dropped(job: Job, num_documents: int) -> list[str | None]:
    """Each document's reason. Units of one file of lines follow one another, with as many documents as were signed."""
    reasons: list[str | None] = [None] * num_documents
    before = 0
    for unit in range(job.num_units):
        for path in job.dropped(unit):
            for line in path.read_text(encoding="utf-8").splitlines():
                drop = json.loads(line)
                place = before + drop["document"]
                reasons[place] = reasons[place] or drop["reason"].partition(":")[0]
        before += sum(1 for _ in documents(job, unit))
    assert before == num_documents
    return reasons


def similarities(texts: Sequence[str]) -> list[float]:
    """The Jaccard similarity of each text to that other one which is most like it, by counting."""
    from megacode.data.preparing.dedup import SHINGLE
    from megacode.data.preparing.words import ngram_hashes, word_hashes

    runs = [np.unique(ngram_hashes(word_hashes(text), SHINGLE)).tolist() for text in texts]
    having: dict[int, list[int]] = defaultdict(list)
    for number, own in enumerate(runs):
        for run in own:
            having[run].append(number)
    highest = []
    for number, own in enumerate(runs):
        shared = Counter(other for run in own for other in having[run] if other != number)
        highest.append(max((n / (len(own) + len(runs[o]) - n) for o, n in shared.items()), default=0.0))
    return highest


def quality(made: Made, reasons: Sequence[str | None]) -> dict[str, Any]:
    """What was found of each kind, and how similar to another the files are that went or stayed as near duplicates."""
    found = {kind: dict(Counter(reasons[n] or "stays" for n in places)) for kind, places in made.kinds.items()}
    clean = [n for n, reason in enumerate(reasons) if reason is None or reason.startswith("near")]
    alike = dict(enumerate(similarities(made.texts)))
    went = [alike[n] for n in clean if reasons[n]]
    copies = [n for n in made.kinds["near"] if alike[n] >= SIMILAR[0]]
    return {
        "found": found,
        "near_duplicates": len(went),
        "near_duplicates_above": {str(least): sum(value >= least for value in went) for least in SIMILAR},
        "copies_above": [SIMILAR[0], len(copies), sum(reasons[n] is not None for n in copies)],
    }


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median CPU time of some work in this process."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return median(times)


def exhaust(function: Callable[[str], object], texts: Iterable[str]) -> Callable[[], None]:
    def work() -> None:
        for text in texts:
            function(text)

    return work


def speeds(made: Made, job: Job, folder: Path, rounds: int) -> dict[str, float]:
    """MB/s of one core by step: of texts in memory, then of stages, which read the corpus."""
    import xxhash
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer

    from megacode.data.preparing import words
    from megacode.data.preparing.decontaminate import Index
    from megacode.data.preparing.dedup import Signature
    from megacode.data.preparing.stages import BENCHMARKS

    class Split(WhitespaceTokenizer):
        """Without spaCy."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

    def sign(signature: MinhashDedupSignature) -> Callable[[], None]:
        return exhaust(lambda text: signature.get_signature(signature.get_shingles(text)), made.texts)

    index = Index.load(job.folder / BENCHMARKS)
    theirs = MinhashDedupSignature(str(folder / "theirs"), MinhashConfig(), language=Split())
    theirs._hash_func = lambda run: xxhash.xxh64_intdigest(run.encode())  # since version 4 it hashes bytes only
    steps = {
        "words": exhaust(words.word_hashes.__wrapped__, made.texts),
        "exact signature": sign(Signature(folder, near=False)),
        "near signature": sign(Signature(folder, near=True)),
        "decontamination": exhaust(index.find, made.texts),
        "datatrove's near signature, words parted by spaces": sign(theirs),
    }
    return {name: made.megabytes / seconds(work, rounds) for name, work in steps.items()}


def run_stages(job: Job, made: Made) -> dict[str, float]:
    """MB/s of one core of each stage of de-duplication and decontamination together, its start included."""
    rates = {}
    for stage in stages_of(job):
        rates[f"stage {stage.name}"] = made.megabytes / seconds(partial(_run, stage, job), 1)
    return rates


def _run(stage: Stage, job: Job) -> None:
    run_local([stage], job.folder, 1, lambda name, done, tasks: None)


def main(
    unique: Annotated[int, typer.Option(min=20, help="Files of this machine.")] = 1500,
    near: Annotated[int, typer.Option(min=0, help="Copies with 1 % of words changed.")] = 300,
    exact: Annotated[int, typer.Option(min=0, help="Copies.")] = 100,
    contaminated: Annotated[int, typer.Option(min=1, help="Files with an invented problem in them.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each step.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Measure duplicate removal and decontamination on Python files of this machine; speeds are by CPU time.

    Example: python -m megacode.tools.bench.dedup --rounds 1
    """
    check_installed("this benchmark")
    with json_output(json_file) as write, tempfile.TemporaryDirectory() as scratch:
        made = make(unique, near, exact, contaminated)
        job = start(made, Path(scratch))
        rates = speeds(made, job, Path(scratch), rounds) | run_stages(job, made)
        found = quality(made, dropped(job, len(made.texts)))
        write({"megabytes": made.megabytes, "documents": len(made.texts), "MB/s": rates, **found})
        typer.echo(f"{len(made.texts):,} documents, {made.megabytes:.1f} MB, {job.num_units} units")
        for name, rate in rates.items():
            typer.echo(f"{rate:8.1f} MB/s  {name}")
        for kind, reasons in found["found"].items():
            typer.echo(f"{kind}: {', '.join(f'{count} {reason}' for reason, count in sorted(reasons.items()))}")
        least, num, gone = found["copies_above"]
        typer.echo(f"changed copies that are alike by {least} or more: {num}, of which {gone} went")
        above = ", ".join(f"{count} by {least}" for least, count in found["near_duplicates_above"].items())
        typer.echo(f"near duplicates: {found['near_duplicates']}, alike to another document: {above} or more")


if __name__ == "__main__":
    command_line(main)
