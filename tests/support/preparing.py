"""A corpus of random words with known duplicates and known contamination."""

import json
import random
import signal
from pathlib import Path

UNIT_BYTES = 300_000
"""What to cut units by, so that the corpus has several."""
_WORDS = [f"{a}{b}" for a in ("get", "set", "num", "is", "run", "to") for b in ("_x", "_key", "s", "Item", "_of", "2")]
_PROBLEM = """def solve_{n}(values: List[float], threshold: float) -> bool:
    \"\"\" Check if in a given list of {n} numbers any two numbers are closer to each other than the given threshold.
    >>> solve_{n}([1.0, 2.0, 3.0], 0.5)
    False
    \"\"\"
"""


def write_corpus(path: Path, num: int = 40) -> dict[str, list[int]]:
    """Write JSON lines. Returns: the lines (from 1) of each kind of document: unique, near, exact, contaminated; the
    last three have `num` documents. Copies come behind what they are of."""
    rng = random.Random(0)
    unique = [_text(rng) for _ in range(3 * num)]
    documents = [("unique", text) for text in unique]
    documents += [("near", _changed(text, rng)) for text in unique[:num]]
    documents += [("exact", text) for text in unique[num : 2 * num]]
    documents += [("contaminated", contaminated(_text(rng), n)) for n in range(num)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for _, text in documents), encoding="utf-8")
    kinds = [kind for kind, _ in documents]
    return {kind: [line for line, other in enumerate(kinds, 1) if other == kind] for kind in dict.fromkeys(kinds)}


def benchmark(folder: Path, num: int = 40) -> Path:
    """Problems that `contaminated` texts hold."""
    path = folder / "problems.jsonl"
    records = [{"task_id": f"P/{n}", "prompt": _PROBLEM.format(n=n)} for n in range(num)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def contaminated(text: str, problem: int) -> str:
    """A text with a problem in its middle."""
    middle = len(text) // 2
    return text[:middle] + "\n" + _PROBLEM.format(n=problem) + text[middle:]


def rejects(prefix: Path) -> dict[int, str]:
    """Line -> reason."""
    path = prefix.with_name(prefix.name + ".rejects.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {line["line"]: line["reason"] for line in lines}


def raise_signal(number: int, data: object, rank: int, world_size: int) -> None:
    """A step that sends a signal to its own process."""
    signal.raise_signal(number)


def _text(rng: random.Random) -> str:
    words = [rng.choice(_WORDS) + str(rng.randrange(50)) for _ in range(rng.randrange(200, 600))]
    return "".join(word + rng.choice((" ", " = ", "(", ")\n", "\n    ", ", ")) for word in words)


def _changed(text: str, rng: random.Random) -> str:
    """One word in a hundred is another."""
    words = text.split(" ")
    for i in rng.sample(range(len(words)), max(len(words) // 100, 1)):
        words[i] = f"other{rng.randrange(10**6)}"
    return " ".join(words)
