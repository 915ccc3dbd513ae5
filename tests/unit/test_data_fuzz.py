"""What comes from outside can be anything: whoever reads it gives one line or what is right, and loses nothing.

Damage to single files as their readers see it is tried in test_shards, test_spans, test_readers and test_blocks; here
it is what is made of them: samples, reports, shards.
"""

import ast
import contextlib
import gzip
import itertools
import json
import tempfile
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shards import SOURCE, write_code

from megacode.data.preparing.corpus import Corpus
from megacode.data.preparing.prepare import plan, prepare
from megacode.data.shards import Shards
from megacode.data.source import Source
from megacode.data.stream import TrainStream, ValidationStream
from megacode.data.tokenizer import Tokenizer, train
from megacode.data.verify import verify
from megacode.errors import UserError
from megacode.tools.data.inspect import Question, look
from megacode.tools.data.inspect_text import text

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train([SOURCE], path, 600)
    return Tokenizer(path)


def stream_of(prefix, tokenizer, packing, rate=0.9):
    return TrainStream(
        [Source("s", [prefix])], tokenizer, sequence_length=64, seed=1, packing=packing, infilling_rate=rate,
        suffix_first_rate=0.5, document_masks=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """(packing, with spans) -> the files of a shard by the end of their names, kept counts of best-fit among them."""
    found = {}
    for packing, spans in itertools.product(("concatenate", "best_fit"), (False, True)):
        folder = tmp_path_factory.mktemp("shard")
        prefix = write_code(folder / "s", tokenizer, 20, spans=spans)
        stream_of(prefix, tokenizer, packing)
        found[packing, spans] = {file.name.removeprefix("s."): file.read_bytes() for file in folder.iterdir()}
    return found


WORDS = st.sampled_from([b"\0", b"\xff", b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f" * 2, b"\0\0\0\0\0\0\0\x40", b"}"])
DAMAGE = st.lists(st.tuples(st.integers(0, 10**6), WORDS | st.binary(min_size=1, max_size=2)), max_size=3)


def damaged(data, damage, cut):
    content = bytearray(data)
    for place, word in damage:
        place %= max(1, len(content))
        content[place : place + len(word)] = word
    return bytes(content if cut is None else content[: cut % (len(content) + 1)])


@contextlib.contextmanager
def one_line():
    """Our own error is one line; any other fails the test."""
    try:
        yield
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than a line: {error}") from error


def opened(module, tokenizer):
    """Opening a tokenizer takes longer than all the rest: there it is open already."""
    return mock.patch(f"{module}.Tokenizer", return_value=tokenizer)


@pytest.mark.parametrize("uses", ["samples", "inspection"])
@settings(max_examples=100)
@given(data=st.data(), spans=st.booleans(), packing=st.sampled_from(["concatenate", "best_fit"]), damage=DAMAGE)
def test_damaged_shards(tokenizer, files, uses, data, spans, packing, damage):
    victim = data.draw(st.sampled_from(sorted(files[packing, spans])))
    cut = data.draw(st.none() | st.integers(0, 10**6))
    without = data.draw(st.sampled_from(["", "json", "spans"]))
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "s")
        for name, content in files[packing, spans].items():
            if name != without:
                changed = damaged(content, damage, cut) if name == victim else content
                Path(folder, f"s.{name}").write_bytes(changed)
        for use in (use_stream, use_validation) if uses == "samples" else (inspect_it, verify_it):
            with one_line():
                use(prefix, tokenizer, packing)


def use_stream(prefix, tokenizer, packing):
    stream = stream_of(prefix, tokenizer, packing)
    for number in (*range(12), 10**9 + 7):
        batch = stream.micro_batch([number])
        assert 0 <= batch.tokens.min() <= batch.tokens.max() < tokenizer.vocabulary
        assert sum(len(part.ids) for part in stream.explain(number)) == 65


def use_validation(prefix, tokenizer, packing):
    stream = ValidationStream(Source("s", [prefix]), sequence_length=64, document_masks=True)
    stream.micro_batch(range(min(stream.num_samples, 20)))


def inspect_it(prefix, tokenizer, packing):
    with opened("megacode.tools.data.inspect", tokenizer):
        list(text(look(Question(prefix, tokenizer.path, 2, 0, 64, 0.9))))


def verify_it(prefix, tokenizer, packing):
    verify(prefix, tokenizer)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "loss"]), inner, max_size=2),
    max_leaves=5,
)
SEGMENTS = st.lists(st.fixed_dictionaries({"text": st.text(max_size=9), "loss": st.booleans()}), max_size=4)
RECORD = st.fixed_dictionaries({}, optional={"text": st.text(max_size=30) | SEGMENTS | JSON, "other": JSON})
LINE = RECORD.map(lambda record: json.dumps(record).encode()) | st.binary(max_size=20).map(
    lambda line: line.replace(b"\n", b"")
)
PACKERS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}


def prepared(path, tokenizer):
    """The facts of the shard that a file becomes, or None where it is refused."""
    prefix = path.with_name("s")
    with (
        one_line(),
        opened("megacode.data.preparing.job", tokenizer),
        opened("megacode.data.preparing.prepare", tokenizer),
    ):
        prepare(plan(Corpus([path]), tokenizer.path, prefix), workers=1)
    written = {file.name for file in path.parent.iterdir()} - {path.name, "s.parts"}
    if "s.idx" not in written:
        assert not written, "no partial output"
        return None
    verify(prefix, tokenizer)
    return Shards(prefix).facts


@settings(max_examples=60)
@given(records=st.lists(LINE, max_size=12), end=st.sampled_from(sorted(PACKERS)), damage=st.just([]) | DAMAGE)
def test_every_line_is_a_document_or_a_reject(tokenizer, records, end, damage):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"d{end}")
        path.write_bytes(damaged(PACKERS[end](b"\n".join(records)), damage, None))
        facts = prepared(path, tokenizer)
    if facts and not damage:
        content = b"\n".join(records).removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        lines = sum(bool(line) and not line.isspace() for line in content.split(b"\n"))
        assert facts["num_documents"] + sum(facts["rejected"].values()) == lines


@settings(max_examples=60)
@given(texts=st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]))), damage=st.just([]) | DAMAGE)
def test_every_row_is_a_document_or_a_reject(tokenizer, texts, damage):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "d.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), path)
        path.write_bytes(damaged(path.read_bytes(), damage, None))
        facts = prepared(path, tokenizer)
    if facts and not damage:
        assert facts["num_documents"] + sum(facts["rejected"].values()) == len(texts)


def test_nothing_in_data_files_is_run():
    """Neither pickle nor eval, nor a reader that would."""
    for path in sorted((ROOT / "megacode/data").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "torch"}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "np.load":
                    plain = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert plain.get("allow_pickle") == "False", path
                assert called not in ("eval", "exec", "compile", "numpy.load", "yaml.load"), f"{path}: {called}"
