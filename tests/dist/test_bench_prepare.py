"""The benchmark of preparing runs: all contestants make the same tokens, and each row has its figures."""

import json
import subprocess
import sys
import time

import pytest
from support.exports import train_tokenizer

from megacode.tools.bench.prepare import Row, check, cpu_seconds, family, peak_bytes, table, write_corpus


def test_all_contestants_make_the_same_tokens(tmp_path):
    tokenizer = train_tokenizer(tmp_path / "t.model")
    command = [sys.executable, "-m", "megacode.tools.bench.prepare", "--small", "1", "--large", "0", "--rounds", "1"]
    command += ["--tokenizer", str(tokenizer), "--folder", str(tmp_path), "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["name"], row["workers"], round(row["megabytes"])) for row in rows] == [
        *(("megacode", 1, 1), ("megacode", 2, 1), ("sentencepiece", 1, 1), ("datatrove", 1, 1), ("datatrove", 2, 1)),
    ]
    assert all(row["tokens"] > 100_000 and row["peak_bytes"] > 20e6 and len(row["seconds"]) == 1 for row in rows)
    assert all(row["per_core"][0] == pytest.approx(row["megabytes"] / row["seconds"][0] / row["workers"]) for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"]


def test_the_corpus_has_the_text_it_says(tmp_path):
    megabytes = write_corpus(tmp_path / "corpus", 1)
    texts = [
        [json.loads(line)["text"] for line in (tmp_path / "corpus" / name).open()] for name in ("0.jsonl", "1.jsonl")
    ]
    sizes = [sum(len(text.encode()) for text in half) for half in texts]
    assert sum(sizes) == megabytes * 1e6 >= 1e6
    assert abs(sizes[0] - sizes[1]) < 2 * max(len(text.encode()) for half in texts for text in half)


def test_what_processes_use_is_seen():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(10**7)); input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        while max(cpu_seconds(pid) for pid in family(process.pid)) < 0.1 or len(list(family(process.pid))) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        assert all(10e6 > peak_bytes(pid) / 10 > 3e5 for pid in family(process.pid))
        process.communicate(b"\n")
    assert (cpu_seconds(process.pid), peak_bytes(process.pid)) == (0.0, 0)


def test_other_tokens_end_the_comparison():
    rows = [Row("megacode", 1, 10.0, [2.0, 4.0, 5.0], [1.0, 2.0, 1.5], 100, 7), Row("datatrove", 2, 10.0, [5.0], [5.0], 100, 7)]
    check(rows)
    assert next(line for line in table(rows) if "megacode" in line).endswith("| 2.5 (2.0, 5.0) | 6.7 (5.0, 10.0) | 0 |")
    rows[1].tokens = 8
    with pytest.raises(RuntimeError, match="datatrove makes 8 tokens of the text, and megacode 7"):
        check(rows)
