"""What a benchmark's text is, and which documents hold it."""

import gzip
import json

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megacode.data.preparing.decontaminate import Index
from megacode.errors import UserError

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "from typing import List\n\n\ndef close(numbers: List[float]) -> bool:\n"
    '    """ Check if in given list of numbers, are any two closer to each other than half."""\n',
    "canonical_solution": "    return any(abs(a - b) < 0.5 for i, a in enumerate(numbers) for b in numbers[i + 1:])\n",
    "test": "def check(candidate):\n    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2, 7.1, 9.9, 0.3, 6.25])\n",
}
MBPP = {
    "task_id": 11,
    "text": "Write a python function to remove first and last occurrence of a given character from the string.",
    "code": "def remove_Occ(s, ch):\n    for i in range(len(s)):\n        if s[i] == ch:\n            break\n",
    "test_list": ['assert remove_Occ("hello","l") == "heo"', 'assert remove_Occ("abcda","a") == "bcd"'],
}


@pytest.fixture
def index(tmp_path):
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode() + b"\n"))
    parquet.write_table(pyarrow.Table.from_pylist([MBPP]), tmp_path / "mbpp.parquet")
    (tmp_path / "notes.txt").write_text("Do not tell anyone of these nine particular words")
    (tmp_path / "short.jsonl").write_text('{"prompt": "Sum it up!"}\n{"prompt": "no words"}\n')
    names = ("HumanEval.jsonl.gz", "mbpp.parquet", "notes.txt", "short.jsonl")
    Index.build([tmp_path / name for name in names]).save(tmp_path / "index.npz")
    return Index.load(tmp_path / "index.npz")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (HUMANEVAL["prompt"], "HumanEval.jsonl.gz"),
        ("x = 1\n" + HUMANEVAL["canonical_solution"] + "y = 2\n", "HumanEval.jsonl.gz"),
        ("# check IF in given list\n#   of numbers -- are any two closer, to each other?", "HumanEval.jsonl.gz"),
        (MBPP["code"].replace("    ", "\t").replace("(s, ch)", "( s,ch )"), "mbpp.parquet"),
        ('assert remove_Occ("hello", "l") == "heo"\nassert remove_Occ("abcda", "a") == "bcd"', "mbpp.parquet"),
        ("so: do not tell anyone of these nine particular words.", "notes.txt"),
        ("sum = 0\nsum_it(up)  # Sum it up", "short.jsonl"),
        # Nine words of a longer text are too few.
        ("check if in given list of numbers are any", None),
        # Ten words, of which half or more are numbers.
        ("[1.0, 2.0, 3.9, 4.0, 5.0, 2.2, 7.1, 9.9, 0.3, 6.25]", None),
        # Words that come one behind the other only where imports are left out of the benchmark.
        ("from typing import List\n\ndef close(numbers: List[float])", None),
        ("tell anyone of these nine particular words", None),
        ("", None),
    ],
)
def test_which_documents_hold_a_benchmark(index, text, name):
    found = index.find(text)
    assert (found and found[0]) == name
    assert index.num_skipped == 1


def test_what_was_found_is_told(index):
    name, run = index.find("a b c " + MBPP["text"])
    assert (name, run) == ("mbpp.parquet", "write a python function to remove first and last occurrence")


def test_files_that_are_not_benchmarks(tmp_path):
    bad = {
        "a.jsonl": (
            '{"prompt": "x"}\n{"body": "x"}\n',
            r"a\.jsonl:2 has no text in any of the fields prompt,",
        ),
        "b.jsonl": ("{\n", r"b\.jsonl:1 is not JSON"),
        "c.jsonl": ('{"prompt": 1}\n', r"c\.jsonl:1 has no text"),
        "d.parquet": ("x", r"d\.parquet is not Parquet"),
        "e.jsonl.gz": ("x", r"cannot read .*e\.jsonl\.gz"),
        "f.jsonl": ("[]\n", r"f\.jsonl:1 has no text"),
    }
    for name, (content, message) in bad.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            Index.build([tmp_path / name])
    (tmp_path / "g.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"g\.txt is not UTF-8"):
        Index.build([tmp_path / "g.txt"])
    with pytest.raises(UserError, match="cannot read"):
        Index.build([tmp_path / "absent.txt"])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "g.txt").write_text("x")
    with pytest.raises(UserError, match=r"two --decontaminate files are named g\.txt"):
        Index.build([tmp_path / "g.txt", tmp_path / "x" / "g.txt"])


def test_texts_that_nothing_can_be_found_by_are_counted(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"code": "x = 1"}\n{"code": "1 2 3 4 5 6 7 8 9 10 11"}\n{"code": "a b c"}\n')
    assert Index.build([tmp_path / "s.jsonl"]).num_skipped == 2


def problem(prompt, solution):
    """A problem as HumanEval has them."""
    tests = "def check(candidate):\n    assert candidate([8, 3]) == candidate([3, 8]), 'the order is no matter here'\n"
    return {"prompt": prompt, "canonical_solution": solution, "test": tests}


SHORT = problem(
    'def distinct(l: list):\n    """Return the sorted distinct elements that stand in the given list\n    """\n',
    "    return sorted(list(set(l)))\n",
)
PLAIN = problem(
    'import math\n\n\ndef total(x: int, y: int):\n    """Give the two numbers put together as one number\n    """\n',
    "    return x + y\n",
)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (SHORT["prompt"] + SHORT["canonical_solution"], True),
        ("def distinct(l: list):\n    return sorted(list(set(l)))", True),
        ("y = 1\n" + SHORT["canonical_solution"], True),
        (PLAIN["prompt"] + PLAIN["canonical_solution"], True),
        ("import math\ndef total(x: int, y: int):\n    return x + y", True),
        # A part of fewer than 5 words tells nothing.
        (PLAIN["canonical_solution"], False),
        ("import math\ndef total(x):\n    return x + y", False),
    ],
)
def test_parts_of_a_problem_are_found_by_themselves(tmp_path, text, held):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (SHORT, PLAIN)))
    assert (Index.build([tmp_path / "p.jsonl"]).find(f"a = 1\n{text}\nz = 2\n") is not None) is held


@pytest.mark.parametrize(
    "record",
    [
        # Prose that begins a line with a word of imports.
        {"prompt": 'def f(x):\n """ Return the values\n from the list that are even and above the bound\n in order"""'},
        {"text": "Take these:\nimport the goods into the store and count all that is left"},
        # Imports in the middle of what documents hold.
        {"text": "Area of circle", "code": "import math\ndef f(r):\n return math.pi * r"},
        # Line ends of old.
        {"text": "import os\rGive back the second largest of all the numbers in the list"},
    ],
)
def test_imports_are_no_other_than_they_are(tmp_path, record):
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    text = "\n".join(record.values())
    index = Index.build([tmp_path / "p.jsonl"])
    assert index.num_skipped == 0
    assert index.find(text)
    assert index.find(f"a b c\n{text}\nd e f")


def test_imports_alone_tell_nothing(tmp_path):
    imports = "from typing import List, Dict, Tuple\nimport os, sys as system\nimport json; import re  # as always\n"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": imports, "code": "def only_here(): pass"}))
    assert Index.build([tmp_path / "p.jsonl"]).find(imports) is None


def test_a_signature_alone_tells_nothing(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": SHORT["prompt"].replace("(l: list)", "(a, b, c, d)")}))
    assert Index.build([tmp_path / "p.jsonl"]).find("def distinct(a, b, c, d):\n    return a") is None


def test_a_short_question_or_answer_alone_tells_nothing(tmp_path):
    record = {"question": "Which of these is right?", "answer": "None of the above is right"}
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    index = Index.build([tmp_path / "p.jsonl"])
    assert index.find("Which of these is right? None of the above is right")
    assert not any(map(index.find, record.values()))


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
def test_benchmarks_may_be_packed(tmp_path, pack):
    name = {"plain": "b.ndjson", "gz": "b.jsonl.gz", "zst": "b.jsonl.zst"}
    data = json.dumps({"prompt": " ".join(f"word{i}" for i in range(12))}).encode()
    path = tmp_path / name[{0x7B: "plain", 0x1F: "gz", 0x28: "zst"}[pack(data)[0]]]
    path.write_bytes(pack(data))
    assert Index.build([path]).find(" ".join(f"word{i}" for i in range(12))) is not None


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("b.jsonl", b"", "holds no text"),
        ("b.txt", b" \n", "holds no text"),
        ("b.json", b'{"prompt": "a"}', "name JSON lines .jsonl"),
        ("b.jsonl.zst", b"junk", "cannot read"),
    ],
)
def test_benchmarks_without_text_or_under_a_wrong_name(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        Index.build([tmp_path / name])
