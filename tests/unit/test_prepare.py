"""megacode.data.preparing.job, parts, pool and prepare."""

import gzip
import hashlib
import inspect
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import typer
from support.trees import small_model, write

from megacode.data.preparing import corpus as corpus_module
from megacode.data.preparing import lock, parts, pool
from megacode.data.preparing.corpus import Corpus, is_valid
from megacode.data.preparing.filters import Filters
from megacode.data.preparing.job import Job, documents
from megacode.data.preparing.lock import locked
from megacode.data.preparing.parts import frame, merge, run_unit
from megacode.data.preparing.prepare import plan, prepare, train_tokenizer
from megacode.data.preparing.readers import Fields
from megacode.data.shards import Shards
from megacode.data.spans import Spans
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError
from megacode.tools import executors


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(small_model(tmp_path_factory.mktemp("tokenizer") / "t.model", 500))


def texts(prefix, tokenizer):
    shards = Shards(prefix)
    shards.verify()
    documents = [shards.document(i).tolist() for i in range(shards.num_documents)]
    assert all((ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos) for ids in documents)
    return [tokenizer.decode(ids[1:-1]) for ids in documents]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rejects(prefix):
    return [json.loads(line) for line in Path(f"{prefix}.rejects.jsonl").read_text().splitlines()]


NUM_UNITS = 9


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Folder, JSON lines and a packed file, which come to nine units."""
    monkeypatch.setattr(corpus_module, "UNIT_BYTES", 300)
    write(tmp_path / "tree", {f"{i}.py": f"x = {i}\n" * 9 for i in range(10)} | {"bad.py": b"\xff"})
    lines = [json.dumps({"text": f"# line {i}\n" * (i % 3), "lang": "Python"}) for i in range(40)]
    lines[30] = "{"
    write(tmp_path, {"d.jsonl": "\n".join(lines), "e.jsonl.gz": gzip.compress(b'{"text": "packed"}\n')})
    return [tmp_path / name for name in ("tree", "d.jsonl", "e.jsonl.gz")]


def test_documents_become_shards(tmp_path, inputs, tokenizer):
    job = plan(Corpus(inputs), tokenizer.path, tmp_path / "out" / "s")
    assert job.num_units == NUM_UNITS
    told = []
    summary = prepare(job, 1, told.append)
    names = {f"x = {i}\n" * 9 for i in range(10)} | {f"# line {i}\n" * (i % 3) for i in range(40) if i % 3 and i != 30}
    assert sorted(texts(tmp_path / "out" / "s", tokenizer)) == sorted([*names, "packed"])
    assert sum(told) == job.num_bytes == sum(path.stat().st_size for path in [*inputs[0].iterdir(), *inputs[1:]])
    empty = [{"input": 2, "document": "d.jsonl", "line": i + 1, "reason": "empty"} for i in range(0, 40, 3) if i != 30]
    bad = [
        {"input": 1, "document": "bad.py", "reason": "not UTF-8"},
        {"input": 2, "document": "d.jsonl", "line": 31, "reason": "not JSON"},
    ]
    assert sorted(rejects(tmp_path / "out" / "s"), key=str) == sorted([*empty, *bad], key=str)
    facts = json.loads((tmp_path / "out" / "s.json").read_text())
    assert facts == json.loads(json.dumps(summary["train"]))
    assert facts["rejected"] == {"empty": 13, "not JSON": 1, "not UTF-8": 1}
    assert (facts["tokenizer_sha256"], facts["engine"]) == (tokenizer.sha256, tokenizer.engine.name)
    assert set(facts["languages"]) == {"python", "unknown"}
    assert facts["languages"]["python"]["documents"] == 10
    assert facts["languages"]["python"]["bytes"] == 10 * 9 * 6
    assert sum(counts["tokens"] for counts in facts["languages"].values()) == facts["num_tokens"]
    assert len(facts["checksums"]) == NUM_UNITS
    assert set(files(tmp_path / "out")) == {"s.bin", "s.idx", "s.json", "s.rejects.jsonl"}


@pytest.mark.parametrize("known", ["as found", "sentencepiece", "of another machine"])
def test_workers_take_the_engine_over_and_bytes_do_not_depend_on_it(tmp_path, inputs, tokenizer, known, monkeypatch):
    prepare(plan(Corpus(inputs), tokenizer.path, tmp_path / "one" / "s"), 1)
    job = plan(Corpus(inputs), tokenizer.path, tmp_path / "two" / "s")
    assert Job.load(job.folder).engine == tokenizer.engine.name
    own = Tokenizer(tokenizer.path, oracle=True).engine.name
    engine = {"as found": tokenizer.engine.name, "sentencepiece": own}.get(known, known)
    said = json.loads((job.folder / "job.json").read_text())
    (job.folder / "job.json").write_text(json.dumps(said | {"engine": engine}))
    again = plan(Corpus(inputs), tokenizer.path, tmp_path / "two" / "s")  # the same job, with what stands there
    assert again == job
    assert again.engine == engine
    probed = []

    def probes(tokenizer):
        probed.append(tokenizer)
        yield "text"

    monkeypatch.setattr("megacode.data.tokenizer.probes", probes)
    prepare(again, 1)
    assert len(probed) == (known == "of another machine")
    one, two = ({name: data for name, data in files(tmp_path / n).items() if name != "s.json"} for n in ("one", "two"))
    assert one == two
    facts = [json.loads((tmp_path / n / "s.json").read_text()) for n in ("one", "two")]
    assert facts[1]["engine"] == (own if known == "sentencepiece" else tokenizer.engine.name)
    assert {**facts[0], "engine": ""} == {**facts[1], "engine": ""}


def test_names_that_are_no_unicode(tmp_path, tokenizer):
    lines = [{"text": "x = 1", "lang": "\ud800"}, {"text": "x = 2", "lang": "C"}, {"text": "x = 3"}]
    path = tmp_path / os.fsdecode(b"d\xff.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = plan(Corpus([path], fields=Fields(language="lang")), tokenizer.path, tmp_path / "out" / "s")
    drop = {"document": 2, "reason": "contaminated: \udcff.jsonl"}
    write(job.folder / "dropped", {"000000.decontaminate.jsonl": json.dumps(drop) + "\n"})
    prepare(job, 1)
    facts = Shards(tmp_path / "out" / "s").facts
    assert {name: counts["documents"] for name, counts in facts["languages"].items()} == {"c": 1, "unknown": 1}
    assert facts["source"].startswith(f"{tmp_path}/d\\udcff.jsonl ")
    assert facts["rejected"] == {rejects(tmp_path / "out" / "s")[0]["reason"]: 1}


def test_inputs_of_one_name_are_told_apart(tmp_path, tokenizer):
    write(tmp_path, {"a/x.jsonl": '{"text": "x = 1"}\n{\n', "b/x.jsonl": '{"text": "x = 2"}\n\n[]\n'})
    job = plan(Corpus([tmp_path / "b" / "x.jsonl", tmp_path / "a" / "x.jsonl"]), tokenizer.path, tmp_path / "s")
    write(job.folder / "dropped", {"000000.exact.jsonl": '{"document": 0, "reason": "exact duplicate"}\n'})
    prepare(job, 1)
    assert rejects(tmp_path / "s") == [
        {"input": 1, "document": "x.jsonl", "line": 1, "reason": "exact duplicate"},
        {"input": 1, "document": "x.jsonl", "line": 3, "reason": "no JSON object"},
        {"input": 2, "document": "x.jsonl", "line": 2, "reason": "not JSON"},
    ]


def test_nothing_left_out_leaves_no_list(tmp_path, tokenizer):
    prepare(plan(Corpus([write(tmp_path / "tree", {"a.py": "a"})]), tokenizer.path, tmp_path / "out" / "s"))
    assert set(files(tmp_path / "out")) == {"s.bin", "s.idx", "s.json"}


def test_bytes_do_not_depend_on_workers_or_interruptions(tmp_path, inputs, tokenizer):
    def start(name):
        return plan(
            Corpus(inputs), tokenizer.path, tmp_path / name / "s", valid=tmp_path / name / "v", valid_fraction=0.4
        )

    prepare(start("one"), 1)
    prepare(start("two"), 2)
    job = start("resumed")
    for unit in (5, 2):
        run_unit(job, unit)
    made = {unit: (job.part(unit) / "train.bin").stat().st_ino for unit in (5, 2)}
    write(job.folder, {"000003.dead.tmp/train.bin.1.tmp": b"half"})
    again = start("resumed")
    assert again == job
    inodes = {}
    run = parts.run_unit

    def watched(job, unit, on_bytes):
        run(job, unit, on_bytes)
        inodes[unit] = (job.part(unit) / "train.bin").stat().st_ino

    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "run_unit", watched)
        prepare(again, 1, told.append)
    assert {unit: inodes[unit] for unit in made} == made, "finished parts are not made again"
    assert sum(told) == job.num_bytes
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "resumed")
    assert len(files(tmp_path / "one")) == 7


def test_a_merge_that_was_interrupted_is_done_again(tmp_path, inputs, tokenizer, monkeypatch):
    prepare(plan(Corpus(inputs), tokenizer.path, tmp_path / "one" / "s"), 1)
    job = plan(Corpus(inputs), tokenizer.path, tmp_path / "two" / "s")
    with monkeypatch.context() as patch:
        for unit in range(job.num_units):
            run_unit(job, unit)
        patch.setattr(parts, "_remove", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge(job)
    assert (tmp_path / "two" / "s.idx").exists()
    prepare(plan(Corpus(inputs), tokenizer.path, tmp_path / "two" / "s"), 1)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_document_that_cannot_be_cut_is_rejected(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("megacode.data.joints.LONGEST", 1000)
    monkeypatch.setattr("megacode.data.joints.STRETCH", 500)
    texts = ["x = 1\n" * 500, "y = 2\n" + " " * 2000, "z = 3\n"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(plan(Corpus([tmp_path / "d.jsonl"]), tokenizer.path, tmp_path / "s"), 1)
    told = [json.loads(line) for line in (tmp_path / "s.rejects.jsonl").read_text().splitlines()]
    assert told == [{"document": "d.jsonl", "line": 2, "reason": "nowhere to cut"}]
    assert Shards(tmp_path / "s").num_documents == 2


def test_a_unit_is_read_without_the_others(tmp_path, inputs, tokenizer):
    job = plan(Corpus(inputs), tokenizer.path, tmp_path / "s")
    unit = job.unit(NUM_UNITS - 2)
    lines = (job.folder / "units.jsonl").read_bytes().splitlines(keepends=True)
    gone = [line if n == NUM_UNITS - 2 else b"\n" * len(line) for n, line in enumerate(lines)]
    (job.folder / "units.jsonl").write_bytes(b"".join(gone))
    assert Job.load(job.folder).unit(NUM_UNITS - 2) == unit
    assert not list(job.folder.glob("*.tmp"))


def test_any_process_can_work_on_a_job(tmp_path, inputs, tokenizer):
    job = plan(Corpus(inputs, filters=Filters(languages=("python",))), tokenizer.path, tmp_path / "s")
    loaded = Job.load(job.folder)
    assert loaded == job
    assert [loaded.unit(unit) for unit in range(NUM_UNITS)] == [job.unit(unit) for unit in range(NUM_UNITS)]
    found = [document.key for unit in range(NUM_UNITS) for document in documents(loaded, unit)]
    assert found == [document.key for document in job.corpus.documents()]
    with pytest.raises(UserError, match=r"000000 is missing; run the same command again"):
        merge(job)
    (job.folder / "job.json").write_text("{}")
    with pytest.raises(UserError, match=r"job\.json cannot be understood; remove"):
        Job.load(job.folder)
    with pytest.raises(UserError, match=r"job\.json is missing"):
        Job.load(tmp_path)


def test_what_was_dropped_is_not_tokenized(tmp_path, inputs, tokenizer):
    job = plan(Corpus(inputs), tokenizer.path, tmp_path / "out" / "s")
    everything = [(unit, document) for unit in range(NUM_UNITS) for document in documents(job, unit)]
    ordinals = {}
    for unit, document in everything:
        ordinals.setdefault(unit, []).append(document)
    lists = {"000001.exact.jsonl": (1, [0], "exact duplicate"), "000001.near.jsonl": (1, [0, 1], "near duplicate")}
    lists["000005.decontaminate.jsonl"] = (5, [0], "contaminated: HumanEval")
    for name, (_, dropped, reason) in lists.items():
        lines = "".join(json.dumps({"document": ordinal, "reason": reason}) + "\n" for ordinal in dropped)
        write(job.folder / "dropped", {name: lines})
    gone = {ordinals[1][0].key: "exact duplicate", ordinals[1][1].key: "near duplicate"}
    gone[ordinals[5][0].key] = "contaminated: HumanEval"
    summary = prepare(job, 1)
    assert texts(tmp_path / "out" / "s", tokenizer) == [d.text for _, d in everything if d.key not in gone]
    found = summary["train"]["rejected"]
    assert {reason: found[reason] for reason in gone.values()} == dict.fromkeys(gone.values(), 1)
    assert {"input": 2, "document": "d.jsonl", "line": 31, "reason": "not JSON"} in rejects(tmp_path / "out" / "s")


def test_segments_give_spans(tmp_path, tokenizer):
    bos, eos = tokenizer.bos, tokenizer.eos
    first, second, third = (tokenizer.encode("one"), *map(tokenizer.encode_continuation, (" two", " three")))
    ids = [bos, *first, *second, *third, eos]
    a, b = 1 + len(first), 1 + len(first) + len(second)
    for losses, expected in (
        ((True, True, True), []),
        ((False, True, True), [(0, a)]),
        ((False, False, True), [(0, b)]),
        ((True, False, False), [(a, len(ids))]),
        ((False, True, False), [(0, a), (b, len(ids))]),
    ):
        segments = tuple(zip(("one", " two", " three"), losses, strict=True))
        found, spans = frame("one two three", segments, tokenizer)
        assert (found.tolist(), spans) == (ids, expected)
    assert frame("one", None, tokenizer)[1] == []
    segments = (("", False), ("one", True), ("", False), (" two", True))
    assert frame("one two", segments, tokenizer)[1] == [(0, 1)]
    records = [{"text": "plain"}, {"text": [{"text": "ask", "loss": False}, {"text": "!", "loss": True}]}]
    write(tmp_path, {"d.jsonl": "".join(json.dumps(record) + "\n" for record in records)})
    with pytest.raises(UserError, match="no document is left"):
        prepare(
            plan(
                Corpus([tmp_path / "d.jsonl"]),
                tokenizer.path,
                tmp_path / "s",
                valid=tmp_path / "v",
                valid_fraction=1e-9,
            )
        )
    assert {path.name for path in tmp_path.iterdir()} == {"d.jsonl"}
    prepare(plan(Corpus([tmp_path / "d.jsonl"]), tokenizer.path, tmp_path / "s"), 1)
    assert [Spans(tmp_path / "s", 2).of(i).tolist() for i in range(2)] == [[], [[0, 1 + len(tokenizer.encode("ask"))]]]
    facts = json.loads((tmp_path / "s.json").read_text())
    digest = hashlib.sha256((tmp_path / "s.spans").read_bytes()).hexdigest()
    assert (facts["num_spans"], facts["spans_sha256"]) == (1, digest)


def test_validation_is_chosen_by_name(tmp_path, tokenizer):
    tree = write(tmp_path / "tree", {f"{i}.py": f"x = {i}\n" for i in range(1000)})
    options = {"valid_fraction": 0.2}
    summary = prepare(plan(Corpus([tree]), tokenizer.path, tmp_path / "t", valid=tmp_path / "v", **options), 1)
    train, valid = texts(tmp_path / "t", tokenizer), texts(tmp_path / "v", tokenizer)
    assert sorted(train + valid) == sorted(f"x = {i}\n" for i in range(1000))
    assert len(valid) == summary["valid"]["num_documents"] == sum(is_valid(f"{i}.py", 0.2) for i in range(1000))
    assert len(valid) == pytest.approx(200, abs=42), "3.3 standard deviations are 42"
    for i in range(0, 1000, 2):
        (tree / f"{i}.py").unlink()
        (tree / f"{i + 1}.py").write_text(f"x = {i + 1}\n# changed\n")
    prepare(plan(Corpus([tree]), tokenizer.path, tmp_path / "t2", valid=tmp_path / "v2", **options), 1)
    assert {text.removesuffix("# changed\n") for text in texts(tmp_path / "v2", tokenizer)} < set(valid)


def test_prepare_refuses_and_leaves_nothing(tmp_path, tokenizer):
    corpus = Corpus([write(tmp_path / "tree", {"a.py": "a", "b.py": ""})])
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(out)
    for options, message in (
        ({"valid": out / "s"}, "give two prefixes"),
        ({"valid": out / "absent" / ".." / "s"}, "give two prefixes"),
        ({"valid": tmp_path / "link" / "s"}, "give two prefixes"),
        ({"valid": out / "v", "valid_fraction": 1.0}, "--valid-fraction is 1.0"),
        ({"valid": out / "v", "valid_fraction": 1e-9}, r"no document is left for .*v \(left out: 1 empty\)"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(plan(corpus, tokenizer.path, out / "s", **options))
    with pytest.raises(UserError, match=r"absent is no file"):
        plan(Corpus([tmp_path / "absent"]), tokenizer.path, out / "s")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        plan(corpus, tokenizer.path, tmp_path / "file" / "s")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_file_ends_the_command(tmp_path, inputs, tokenizer, workers):
    packed = inputs[2].read_bytes()
    inputs[2].write_bytes(packed[:-8])
    job = plan(Corpus(inputs), tokenizer.path, tmp_path / "out" / "s")
    with pytest.raises(UserError, match=r"e\.jsonl\.gz is a damaged gzip file"):
        prepare(job, workers)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["s.parts"]
    inputs[2].write_bytes(packed)
    with pytest.raises(UserError, match=r"s\.parts is of inputs that have changed since; .* or remove"):
        plan(Corpus(inputs), tokenizer.path, tmp_path / "out" / "s")


def test_outputs_in_a_folder_of_inputs_are_no_inputs(tmp_path, tokenizer):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("x = 1", "", "x = 2"))
    data = write(tmp_path / "data", {"a.jsonl": lines, "b.jsonl": lines})
    (tmp_path / "link").symlink_to(data)
    corpus, before = Corpus([data], suffixes=(".jsonl", ".json")), None
    for _ in range(2):
        job = plan(corpus, tokenizer.path, tmp_path / "link" / "s")
        run_unit(job, 0)
        assert plan(corpus, tokenizer.path, tmp_path / "link" / "s") == job, "it goes on"
        prepare(job, 1)
        assert (data / "s.rejects.jsonl").exists()
        assert before in (None, files(data))
        before = files(data)
        (data / "s.bin").unlink()
    with pytest.raises(UserError, match="has no file that ends in"):
        plan(Corpus([data], suffixes=("s.json",)), tokenizer.path, data / "s")


def test_names_come_after_contents(tmp_path, tokenizer, monkeypatch):
    """A power loss must not leave a name of a part or a shard without its content."""
    text = [{"text": "ask", "loss": False}, {"text": "!", "loss": True}]
    write(tmp_path, {"d.jsonl": json.dumps({"text": text}) + "\n{\n"})
    synced, renamed, order = set(), [], []
    fsync, replace = os.fsync, os.replace

    def record(file):
        synced.add(os.fstat(file).st_ino)
        order.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    def check(old, new):
        path = Path(old)
        if path.suffix != ".tmp" or ".spans." not in path.name:  # spans are forced when they have their name
            for inner in [path, *(path.iterdir() if path.is_dir() else ())]:
                assert inner.stat().st_ino in synced, f"{inner} is not on the disk"
        renamed.append(Path(new).name)
        order.append(f"-> {new}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", check)
    prepare(plan(Corpus([tmp_path / "d.jsonl"]), tokenizer.path, tmp_path / "out" / "s"), 1)
    names = ["units.jsonl", "job.json", "train.bin", "train.json", "train.idx", "000000", "s.bin", "s.json", "s.idx"]
    assert [name for name in renamed if name in names] == names
    spans = order.index(f"{tmp_path}/out/s.spans")
    assert order.index(f"-> {tmp_path}/out/s.spans") < spans < order.index(f"-> {tmp_path}/out/s.idx")
    for name in ("s.bin", "s.json", "s.idx"):
        place = order.index(f"-> {tmp_path}/out/{name}")
        assert order[place + 1] == f"{tmp_path}/out", "a name is on the disk before the next one is given"


def test_a_merge_that_is_run_again_is_done(tmp_path, inputs, tokenizer):
    job = plan(Corpus(inputs), tokenizer.path, tmp_path / "s", valid=tmp_path / "v", valid_fraction=0.5)
    assert job.finished() is None
    for unit in range(job.num_units):
        run_unit(job, unit)
    summary = json.loads(json.dumps(merge(job)))
    made = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    assert merge(job) == summary == job.finished()
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == made
    assert plan(Corpus(inputs), tokenizer.path, tmp_path / "s", valid=tmp_path / "v", valid_fraction=0.5) == job
    with pytest.raises(UserError, match=r"v\.bin is there already"):
        plan(Corpus(inputs), tokenizer.path, tmp_path / "v", valid=tmp_path / "s", valid_fraction=0.5)
    (tmp_path / "v.idx").unlink()
    with pytest.raises(UserError, match=r"000000 is missing"):
        merge(job)


def test_other_options_do_not_go_on(tmp_path, inputs, tokenizer):
    job = plan(Corpus(inputs), tokenizer.path, tmp_path / "s")
    with pytest.raises(UserError, match=r"another min_bytes \(0\); give the same inputs and options"):
        plan(Corpus(inputs, filters=Filters(min_bytes=2)), tokenizer.path, tmp_path / "s")
    with pytest.raises(UserError, match="another valid_fraction"):
        plan(Corpus(inputs), tokenizer.path, tmp_path / "s", valid_fraction=0.2)
    assert plan(Corpus(inputs), tokenizer.path, tmp_path / "s") == job


def test_one_command_at_a_time(tmp_path, inputs, tokenizer):
    job = plan(Corpus(inputs), tokenizer.path, tmp_path / "s")
    with (
        locked(job.output),
        pytest.raises(UserError, match=r"another `megacode prepare` works on .*s; wait"),
    ):
        prepare(job, 1)
    with locked(tmp_path / "new"), pytest.raises(UserError, match=r"works on .*new; wait"):
        plan(Corpus(inputs), tokenizer.path, tmp_path / "new")
    assert not (tmp_path / "new.parts").exists()
    with locked(job.output, shared=True), locked(job.output, shared=True):
        assert plan(Corpus(inputs), tokenizer.path, tmp_path / "s") == job, "nothing is written, so nothing is locked"
        with pytest.raises(UserError, match="another `megacode prepare` works on"):
            prepare(job, 1)
    assert not (tmp_path / "s.lock").exists()
    prepare(job, 1)
    assert prepare(job, 1)["train"] == Shards(tmp_path / "s").facts, "another command has been faster"
    (tmp_path / "s.idx").unlink()
    with pytest.raises(UserError, match=r"job\.json is missing"):
        prepare(job, 1)
    (tmp_path / "s.lock").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*s\.lock: Is a directory; mend that"):
        prepare(job, 1)


def test_a_job_that_another_command_has_replaced(tmp_path, inputs, tokenizer):
    job = plan(Corpus(inputs), tokenizer.path, tmp_path / "s")
    shutil.rmtree(job.folder)
    plan(Corpus(inputs), tokenizer.path, tmp_path / "s", valid=tmp_path / "v")
    with pytest.raises(UserError, match=r"s\.parts has become another preparation's"):
        prepare(job, 1)


def test_the_lock_of_a_holder_that_has_gone_is_taken_anew(tmp_path, monkeypatch):
    real, removed = lock.fcntl.flock, []

    def flock(file, kind):
        if not removed:
            removed.append((tmp_path / "s.lock").unlink())  # between opening and locking
        real(file, kind)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with locked(tmp_path / "s"), pytest.raises(UserError, match="another"), locked(tmp_path / "s"):
        pass


def test_what_is_left_of_parts_does_not_let_a_shard_be_replaced(tmp_path, inputs, tokenizer, monkeypatch):
    prepare(plan(Corpus(inputs[:1]), tokenizer.path, tmp_path / "s"), 1)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("s.*")}
    (tmp_path / "s.parts" / "000003").mkdir(parents=True)
    with pytest.raises(UserError, match=r"s\.parts has no job\.json that says what its parts are of; remove"):
        plan(Corpus(inputs[1:]), tokenizer.path, tmp_path / "s")
    (tmp_path / "s.parts" / "000003").rmdir()
    with pytest.raises(UserError, match=r"s\.bin is there already"):
        plan(Corpus(inputs[1:]), tokenizer.path, tmp_path / "s")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("s.*[!s]")} == before
    for name in before:
        (tmp_path / name).unlink()
    real = shutil.rmtree
    monkeypatch.setattr(parts.shutil, "rmtree", lambda path, *args, **kwargs: None)
    prepare(plan(Corpus(inputs[1:]), tokenizer.path, tmp_path / "s"), 1)
    assert not (tmp_path / "s.parts").exists(), "parts of which some are gone do not have their name"
    assert (tmp_path / "s.parts.done.tmp").exists()
    monkeypatch.setattr(parts.shutil, "rmtree", real)


@pytest.fixture
def slow_job(tmp_path, tokenizer):
    """A job of four units of which the third waits: its file is a pipe, until it is given back what it was."""
    tree = write(tmp_path / "tree", {f"{i}.py": "x" * 300 for i in range(4)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "UNIT_BYTES", 300)
        job = plan(Corpus([tree]), tokenizer.path, tmp_path / "out" / "s")
        prepare(plan(Corpus([tree]), tokenizer.path, tmp_path / "whole" / "s"), 1)
    file = job.corpus.path(job.unit(2)[0])
    file.rename(tmp_path / "kept")
    os.mkfifo(file)
    return job, lambda: (tmp_path / "kept").replace(file)


def test_a_worker_that_is_killed_is_told(slow_job, tmp_path):
    job, give_back = slow_job
    others = {process.pid for process in multiprocessing.active_children()}

    def workers():
        return [process for process in multiprocessing.active_children() if process.pid not in others]

    def kill(_):
        if all(job.part(unit).exists() for unit in (0, 1, 3)):
            for process in workers():
                process.kill()

    with pytest.raises(UserError, match=r"a worker was killed by SIGKILL, .* in unit 2; .* goes on"):
        pool.run_units(job, range(4), 2, kill)
    assert workers() == []
    give_back()
    prepare(job, 2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


WORK = """
import sys
from megacode.data.preparing.job import Job
from megacode.data.preparing.prepare import prepare
prepare(Job.load(sys.argv[1]), 2)
"""


def test_ctrl_c_leaves_the_finished_parts(slow_job, tmp_path):
    job, give_back = slow_job
    command = [sys.executable, "-c", WORK, str(job.folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        stop = time.monotonic() + 60
        while not all(job.part(unit).exists() for unit in (0, 1, 3)) and time.monotonic() < stop:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert said.count("Traceback") == 1, "the workers say nothing"
    assert not job.part(2).exists()
    give_back()
    prepare(job, 2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def run_command(arguments, **options):
    code = "from megacode.cli import main; main()"
    command = [sys.executable, "-c", code, "prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_ctrl_c_says_how_far_it_came(slow_job, monkeypatch, capsys):
    job, _ = slow_job

    def interrupted(*arguments):
        job.part(1).mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("megacode.data.preparing.prepare.prepare", interrupted)
    with pytest.raises(typer.Exit) as left:
        executors.on_this_machine(job, 2)
    assert left.value.exit_code == 130
    assert f"interrupted: 1 of {job.num_units} parts are done" in capsys.readouterr().err


def test_a_full_disk(tmp_path, tokenizer):
    tree = write(tmp_path / "tree", {f"{i}.py": f"# {i}\n" * 4000 for i in range(3)})
    arguments = [tree, "--tokenizer", tokenizer.path, "--output", tmp_path / "out" / "s"]
    # A limit to the size of files does what a full disk does, in the middle of writing.
    done = run_command(arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "File too large; mend that and give the same command again" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["s.parts"]
    assert not list((tmp_path / "out" / "s.parts").glob("*.tmp"))
    done = run_command(arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(texts(tmp_path / "out" / "s", tokenizer)) == 3


def test_a_tokenizer_from_the_first_documents_only(tmp_path):
    source = inspect.getsource(textwrap)
    corpus = Corpus([write(tmp_path / "tree", {f"{i}.py": source + f"# {i}\n" for i in range(5)})])
    told = []
    train_tokenizer(corpus, tmp_path / "one.model", 400, max_bytes=len(source) * 2, on_bytes=told.append)
    assert len(source) * 2 < sum(told) < len(source) * 2.1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*t\.model"):
        train_tokenizer(corpus, tmp_path / "file" / "t.model", 400)
