"""What is found to be a duplicate, how well, and that nothing but the corpus decides it."""

import json
import random
import signal
from collections import Counter
from functools import partial

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
from support.preparing import UNIT_BYTES, benchmark, contaminated, raise_signal, rejects, write_corpus
from support.trees import small_model

from megacode.data.preparing import words
from megacode.data.preparing.corpus import Corpus
from megacode.data.preparing.dedup import NUM_BUCKETS, Buckets, Cluster, Signature, duplicates
from megacode.data.preparing.local import LocalExecutor, pool
from megacode.data.preparing.prepare import plan, prepare
from megacode.data.preparing.stages import check_installed, stages_of
from megacode.data.shards import Shards
from megacode.errors import UserError

NEAR = {"dedup": "near"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr("megacode.data.preparing.corpus.UNIT_BYTES", UNIT_BYTES)


def bytes_of(prefix):
    return {end: prefix.with_name(prefix.name + end).read_bytes() for end in (".bin", ".idx", ".rejects.jsonl")}


def test_quality(tmp_path, model, small_units):
    """All exact copies but one go, near copies mostly, documents with benchmark text all, and of others none."""
    kinds = write_corpus(tmp_path / "d.jsonl")
    job = plan(Corpus([tmp_path / "d.jsonl"]), model, tmp_path / "s", decontaminate=[benchmark(tmp_path)], **NEAR)
    assert job.num_units > 2
    prepare(job, 1)
    reasons = rejects(tmp_path / "s")
    found = {kind: Counter(reasons.get(line) for line in lines) for kind, lines in kinds.items()}
    num = len(kinds["near"])
    assert found["exact"] == {"exact duplicate": num}
    assert found["contaminated"] == {"contaminated: problems.jsonl": num}
    assert found["near"]["near duplicate"] >= 0.9 * num
    assert set(found["near"]) <= {"near duplicate", None}
    assert found["unique"] == {None: 3 * num}
    facts = json.loads((tmp_path / "s.json").read_text())
    assert facts["rejected"] == Counter(reasons.values())
    assert facts["num_documents"] == Shards(tmp_path / "s").num_documents == 6 * num - len(reasons)


def test_a_contaminated_document_does_not_stand_for_its_clean_copies(tmp_path, model):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in contaminated_and_copy()))
    prepare(plan(Corpus([tmp_path / "d.jsonl"]), model, tmp_path / "s", decontaminate=[benchmark(tmp_path)], **NEAR))
    assert rejects(tmp_path / "s") == {1: "contaminated: problems.jsonl"}
    told = json.loads((tmp_path / "s.rejects.jsonl").read_text())
    assert told["found"] == "def solve_0 values list float threshold float bool check if"


def contaminated_and_copy():
    rng = random.Random(0)
    text = " ".join(f"word{rng.randrange(10**6)}" for _ in range(1000))
    return contaminated(text, 0), text


def test_bytes_depend_on_neither_workers_nor_interruptions(tmp_path, model, small_units):
    write_corpus(tmp_path / "d.jsonl")
    corpus, options = Corpus([tmp_path / "d.jsonl"]), NEAR | {"decontaminate": [benchmark(tmp_path)]}
    prepare(plan(corpus, model, tmp_path / "one", **options), 1)
    prepare(plan(corpus, model, tmp_path / "two", **options), 2)
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")

    job = plan(corpus, model, tmp_path / "three", **options)
    sign, search, _ = stages_of(job)
    executor = LocalExecutor(sign.name, sign.steps, sign.tasks, sign.folder(job.folder))
    for unit in range(2):
        executor.task(unit)
    assert sign.missing(job.folder) == list(range(2, job.num_units))
    with pytest.raises(
        UserError, match=r"task 0 of the stage search failed \(RuntimeError: told to\); its log is .*log"
    ):
        LocalExecutor(search.name, [fails], search.tasks, search.folder(job.folder)).run_in(None)
    assert "told to" in (search.folder(job.folder) / "logs" / "task_00000.log").read_text()
    prepare(job, 1)
    assert bytes_of(tmp_path / "three") == bytes_of(tmp_path / "one")
    assert not job.folder.exists()


def fails(data, rank, world_size):
    raise RuntimeError("told to")


def test_another_mode_or_benchmark_is_refused(tmp_path, model):
    (tmp_path / "d.jsonl").write_text('{"text": "a b c"}\n')
    problems = benchmark(tmp_path)
    plan(Corpus([tmp_path / "d.jsonl"]), model, tmp_path / "s", dedup="near", decontaminate=[problems])
    with pytest.raises(UserError, match="another dedup"):
        plan(Corpus([tmp_path / "d.jsonl"]), model, tmp_path / "s", dedup="exact", decontaminate=[problems])
    problems.write_text(problems.read_text() + '{"text": "one more problem"}\n')
    with pytest.raises(UserError, match="another benchmarks"):
        plan(Corpus([tmp_path / "d.jsonl"]), model, tmp_path / "s", dedup="near", decontaminate=[problems])


def test_exact_leaves_near_duplicates(tmp_path, model):
    lines = [f"x_{i} = {i}\n" for i in range(300)]
    texts = ["".join(lines), "".join([*lines[:-1], "y = 1\n"]), "".join(lines), "{}", "[]", "{}"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for mode, prefix in (("exact", "e"), ("near", "n")):
        prepare(plan(Corpus([tmp_path / "d.jsonl"]), model, tmp_path / prefix, dedup=mode), 1)
    exact = {3: "exact duplicate", 6: "exact duplicate"}
    assert rejects(tmp_path / "e") == exact
    assert rejects(tmp_path / "n") == exact | {2: "near duplicate"}


def test_a_killed_process_is_told(tmp_path):
    steps = [partial(raise_signal, signal.SIGKILL)]
    with pool(2) as processes, pytest.raises(UserError, match="a process of the stage sign was killed"):
        LocalExecutor("sign", steps, 4, tmp_path / "stages").run_in(processes)


def test_minima_are_those_of_datatrove(tmp_path):
    signature = Signature(tmp_path, near=True)
    runs = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    ours = signature.minima(runs)
    theirs = np.array(MinhashDedupSignature.get_signature(signature, runs[:, None])).reshape(-1)
    np.testing.assert_array_equal(ours, theirs[: len(ours)])
    assert len(ours) == NUM_BUCKETS * 8


def test_signatures_of_short_texts(tmp_path):
    signature = Signature(tmp_path, near=True)
    assert signature.get_shingles("").size == 0
    short, other, same = (signature.get_signature(signature.get_shingles(text)) for text in ("{}", "[]", "{}"))
    assert short == same
    assert not {tuple(bucket) for bucket in short} & {tuple(bucket) for bucket in other}


def test_units_of_six_digits(tmp_path):
    """Files of signatures are listed by name, where unit 100000 comes before unit 99999. The pairs name units."""
    signature = Signature(tmp_path, near=False)
    for unit, texts in ((99_999, "abc"), (100_000, "xyc"), (100_001, "zzx")):
        documents = (Document(text=text, id=str(n)) for n, text in enumerate(texts))
        signature.run(documents, rank=unit, world_size=200_000)
    Buckets(tmp_path, near=False).run(rank=0, world_size=1)
    Cluster(tmp_path).run()
    dropped = {path.name: path.read_text().splitlines() for path in (tmp_path / "dropped").iterdir()}
    gone = {name: [json.loads(line)["document"] for line in lines] for name, lines in dropped.items()}
    assert gone == {"100000.exact.jsonl": [2], "100001.exact.jsonl": [1, 2]}


def test_groups_keep_their_first():
    pairs = np.array([[5, 9], [9, 2], [7, 8], [3, 7], [3, 7]], np.uint64)
    assert duplicates(pairs).tolist() == [5, 7, 8, 9]
    assert duplicates(np.empty((0, 2), np.uint64)).size == 0
    rng = np.random.default_rng(0)
    chain = rng.permutation(1000).astype(np.uint64)
    assert duplicates(np.stack([chain[:-1], chain[1:]], axis=1)).tolist() == list(range(1, 1000))


def test_words():
    assert words.split("def  Foo_1(x):\n\treturn x+2") == ["def", "foo_1", "x", "return", "x", "2"]
    text = " ".join(f"w{i}" for i in range(1000))
    hashes = words.word_hashes(text)
    assert len(set(hashes.tolist())) == 1000
    runs = words.ngram_hashes(hashes, 5)
    assert len(runs) == 996
    np.testing.assert_array_equal(words.ngram_hashes(words.word_hashes(" ".join(text.split()[7:12])), 5), runs[7:8])
    assert words.ngram_hashes(hashes[:4], 5).size == 0


def test_words_of_a_long_text_are_not_cut(monkeypatch):
    text = "some_words of_it " * 100
    whole = words.word_hashes(text)
    words.word_hashes.cache_clear()
    monkeypatch.setattr(words, "_PIECE", 7)
    np.testing.assert_array_equal(words.word_hashes(text), whole)


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr("megacode.data.preparing.stages.NEEDED", ("datatrove", "absent_package"))
    with pytest.raises(UserError, match=r"--dedup needs absent_package; install the extra: pip install .*\[data\]"):
        check_installed("--dedup")
