"""megacode.data.stream on several sources: blending, loss spans, what a sample is made of, and what is refused."""

import argparse
import hashlib
import inspect
import multiprocessing
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.streams import send_samples

from megacode.data.counter import key_of
from megacode.data.infill import Infiller
from megacode.data.shards import ShardWriter
from megacode.data.source import Source
from megacode.data.spans import SpansWriter
from megacode.data.stream import IGNORE, ORDER, open_train, open_valid
from megacode.data.tokenizer import Tokenizer, train
from megacode.errors import UserError
from megacode.recipe import DataSection, SourceSection

TEXT = inspect.getsource(argparse)
LENGTH = 200


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train([TEXT], path, 800)
    return Tokenizer(path)


def write(prefix, tokenizer, count, seed, spans=()):
    """Pieces of code; document i has the spans of `spans`, if it is even, where they fit."""
    generator = random.Random(seed)
    with (
        ShardWriter(prefix, tokenizer.vocabulary, tokenizer_sha256=tokenizer.sha256) as writer,
        SpansWriter(prefix, writer.facts) as spans_writer,
    ):
        for number in range(count):
            start = generator.randrange(len(TEXT) - 900)
            ids = tokenizer.encode(TEXT[start : start + generator.randrange(1, 900)])
            writer.add_document([tokenizer.bos, *ids, tokenizer.eos])
            fitting = [(a, b) for a, b in spans if number % 2 == 0 and b <= len(ids) + 2]
            spans_writer.add_document(fitting)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("shards")
    for number in range(3):
        write(folder / f"code-{number}", tokenizer, 40, number)
    write(folder / "text", tokenizer, 50, 9, spans=((0, 5), (20, 90)))
    return folder


def section(folder, **changes):
    sources = [
        SourceSection(name="code", weight=85.0, shards=[f"{folder}/code-*"]),
        SourceSection(name="text", weight=15.0, shards=[f"{folder}/text"]),
    ]
    return DataSection.model_validate({"train": sources} | changes)


def open_(folder, tokenizer, seed=3, **changes):
    return open_train(section(folder, **changes), tokenizer, LENGTH, seed)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("rate", [0.0, 0.9])
@pytest.mark.parametrize("document_masks", [False, True])
def test_a_sample_and_what_it_is_made_of(folder, tokenizer, packing, rate, document_masks):
    stream = open_(folder, tokenizer, packing=packing, infilling_rate=rate, document_masks=document_masks)
    kinds, sources = Counter(), Counter()
    for number in range(300):
        sample, parts = stream.sample(number), stream.explain(number)
        sources[stream.sources[sample.source]] += 1
        ids = np.concatenate([part.ids for part in parts])
        assert ids[:-1].tolist() == sample.tokens.tolist()
        assert len(ids) == LENGTH + 1
        unpredicted, place = np.zeros(LENGTH + 1, bool), 0
        for part in parts:
            kinds[part.kind] += 1
            if part.kind == "padding":
                unpredicted[place:] = True
                assert part is parts[-1]
                continue
            assert part.source == stream.sources[sample.source]
            assert part.prefix.name.startswith(part.source)
            shards = stream.corpora[sample.source].shard(stream.corpora[sample.source].prefixes.index(part.prefix))
            document = shards.document(part.document)
            if part.kind in ("PSM", "SPM"):
                assert part.source == "code" or part.document % 2 == 1
                assert (part.start, part.stop) == (0, len(document))
                assert part.ids[2] == tokenizer.suffix_id or part.kind == "PSM"
            else:
                assert part.ids.tolist() == document[part.start : part.stop].tolist()
                assert (part.kind == "whole") == (part.stop - part.start == len(document))
            unpredicted[place] |= document_masks and place > 0 and (part.start == 0 or packing == "best_fit")
            unpredicted[place] |= packing == "best_fit" and part.start > 0
            if part.source == "text" and part.document % 2 == 0:
                for start, stop in ((0, 5), (20, 90)):
                    if stop <= len(document):
                        low, high = max(start, part.start), min(stop, part.stop)
                        unpredicted[place + low - part.start : place + max(low, high) - part.start] = True
            place += len(part.ids)
        assert sample.labels.tolist() == np.where(unpredicted, IGNORE, ids)[1:].tolist()
    assert (kinds["PSM"] > 20) == (kinds["SPM"] > 20) == (rate > 0)
    assert (kinds["padding"] > 20) == (packing == "best_fit")
    assert abs(sources["code"] - 255) <= 3


def test_facts_epochs_and_proportions(folder, tokenizer):
    stream = open_(folder, tokenizer)
    assert stream.sources == ("code", "text")
    facts = stream.facts()
    assert [facts[name]["weight"] for name in facts] == pytest.approx([0.85, 0.15], abs=1e-6)
    assert sum(fact["num_tokens"] for fact in facts.values()) == stream.num_tokens
    epochs = stream.epochs(1000)
    assert epochs == pytest.approx([850 / facts["code"]["samples_per_epoch"], 150 / facts["text"]["samples_per_epoch"]])
    best_fit = open_(folder, tokenizer, packing="best_fit").facts()
    assert best_fit["code"]["samples_per_epoch"] > facts["code"]["samples_per_epoch"]


def test_sources_differ_in_their_order(folder, tokenizer, tmp_path):
    for name in ("one", "other"):
        write(tmp_path / name, tokenizer, 60, seed=0)
    sources = [SourceSection(name=name, weight=1.0, shards=[f"{tmp_path}/{name}"]) for name in ("one", "other")]
    stream = open_train(DataSection(train=sources), tokenizer, LENGTH, 3)
    starts = [[], []]
    for number in range(40):
        starts[stream.sample(number).source].append(stream.explain(number)[0].document)
    assert starts[0] != starts[1]


def test_a_spawned_process_sees_the_same(folder, tokenizer):
    stream = open_(folder, tokenizer, packing="best_fit")
    stream.sample(3)  # with shards open and a block planned
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=send_samples, args=(there, stream, [17, 400]))
    process.start()
    assert here.recv() == [stream.sample(number).tokens.tolist() for number in (17, 400)]
    process.join()
    assert process.exitcode == 0


def test_refusals(folder, tokenizer, tmp_path):
    def refused(message, sources, tokenizer=tokenizer, length=LENGTH):
        sections = [SourceSection(name=name, weight=1.0, shards=shards) for name, shards in sources]
        with pytest.raises(UserError, match=message):
            open_train(DataSection(train=sections), tokenizer, length, 0)

    code, text = [f"{folder}/code-*"], [f"{folder}/text"]
    refused(r"the shard .*/code-1 stands in a and again in b", [("a", code), ("b", [f"{folder}/code-1"])])
    refused(r"the shard .*/code-1 stands in a and again in a", [("a", [*code, f"{folder}/code-1"])])
    refused(r"no shard matches .*/none\*", [("a", [f"{folder}/none*"])])
    refused(r"/missing\.idx", [("a", code), ("b", [f"{folder}/missing"])])
    refused("the source b has .* tokens, not enough", [("a", code), ("b", text)], length=12_000)
    with ShardWriter(tmp_path / "foreign", 800, tokenizer_sha256="0") as writer:
        writer.add_document([1, 5, 2] * 100)
    refused("foreign was made with another tokenizer", [("a", code), ("b", [f"{tmp_path}/foreign"])])


def test_a_token_beyond_the_vocabulary_is_told_with_its_document(tokenizer, tmp_path):
    with ShardWriter(tmp_path / "s", 60_000, tokenizer_sha256=tokenizer.sha256) as writer:
        for number in range(200):
            writer.add_document([1, *range(3, 300), 5000 if number == 150 else 7, 2])
    stream = open_train(DataSection(train=f"{tmp_path}/s", infilling_rate=0.0), tokenizer, LENGTH, 0)
    with pytest.raises(UserError, match=r"document 150 of .*/s has token 5000 and the tokenizer has 816 rows"):
        [stream.sample(number) for number in range(stream.cutters[0].per_epoch)]


def test_validation(folder, tokenizer, tmp_path):
    assert open_valid(section(folder), tokenizer, LENGTH) is None
    valid = open_valid(section(folder, valid=f"{folder}/text"), tokenizer, LENGTH)
    labels = np.concatenate([valid.sample(number).labels for number in range(valid.num_samples)])
    corpus = valid.corpus
    spanned = sum(int((spans[:, 1] - spans[:, 0]).sum()) for i in range(50) if (spans := corpus.spans(i)) is not None)
    assert (labels != IGNORE).sum() in (corpus.num_tokens - 1 - spanned, corpus.num_tokens - spanned)
    with ShardWriter(tmp_path / "foreign", 800, tokenizer_sha256="0") as writer:
        writer.add_document([1, 5, 2] * 100)
    with pytest.raises(UserError, match="foreign was made with another tokenizer"):
        open_valid(section(folder, valid=f"{tmp_path}/foreign"), tokenizer, LENGTH)


@settings(max_examples=150)
@given(st.integers(0, 10_000), st.integers(0, 255), st.sampled_from(["concatenate", "best_fit"]), st.booleans())
def test_a_damaged_index_is_no_other_error(tmp_path_factory, tokenizer, place, value, packing, counted):
    folder = tmp_path_factory.mktemp("shard")
    with ShardWriter(folder / "s", tokenizer.vocabulary, tokenizer_sha256=tokenizer.sha256) as writer:
        for number in range(12):
            writer.add_document([1, *range(3, 40 + 20 * number), 2])
    data = DataSection(train=f"{folder}/s", packing=packing, infilling_rate=0.5)
    if counted:
        open_train(data, tokenizer, LENGTH, 0)
    index = bytearray((folder / "s.idx").read_bytes())
    index[place % len(index)] = value
    (folder / "s.idx").write_bytes(index)
    try:
        stream = open_train(data, tokenizer, LENGTH, 0)
        samples = [stream.sample(number) for number in range(30)]
    except UserError:
        return
    assert all(len(sample.tokens) == LENGTH for sample in samples)


def test_without_infilling_nothing_is_drawn_or_encoded(folder, tokenizer, monkeypatch):
    streams = [open_(folder, tokenizer, infilling_rate=0.0, packing=packing) for packing in ("concatenate", "best_fit")]
    monkeypatch.setattr("megacode.data.infill.draw", None)
    for name in ("encode", "encode_array", "encode_continuation", "decode"):
        monkeypatch.setattr(Tokenizer, name, None)
    for stream in streams:
        assert not stream.micro_batch(range(50)).infilled.any()


@pytest.mark.parametrize(
    ("packing", "expected"), [("concatenate", "9f50563e3a2033d7"), ("best_fit", "cb2c4b088911b8de")]
)
def test_the_order_of_samples_has_a_version(tokenizer, tmp_path, packing, expected):
    """Where this fails, runs would go on with other samples than they began with: raise `ORDER` together with it."""
    sections = []
    for source, weight in enumerate((0.7, 0.3)):
        with ShardWriter(tmp_path / str(source), tokenizer.vocabulary, tokenizer_sha256=tokenizer.sha256) as writer:
            for number in range(150):
                writer.add_document([1] * (1 + (number * 37 + source) % 300))
        sections.append(SourceSection(name=str(source), weight=weight, shards=[f"{tmp_path}/{source}"]))
    stream = open_train(DataSection(train=sections, packing=packing, infilling_rate=0.0), tokenizer, LENGTH, 7)
    made = [
        (part.source, part.document, part.start, part.stop)
        for number in range(0, 3000, 7)
        for part in stream.explain(number)
    ]
    assert (ORDER, hashlib.sha256(repr(made).encode()).hexdigest()[:16]) == (2, expected)


def test_the_choice_and_the_cuts_of_infilling_have_a_version(tokenizer, tmp_path, monkeypatch):
    """As above."""
    with ShardWriter(tmp_path / "s", tokenizer.vocabulary, tokenizer_sha256=tokenizer.sha256) as writer:
        for number in range(200):
            ids = tokenizer.encode("a = 1\n" * (1 + number % 9))
            writer.add_document([tokenizer.bos, *ids, tokenizer.eos])
    made = []

    def record(prefix, middle, suffix, tokenizer, *, suffix_first):
        made.append((len(prefix), len(middle), len(suffix), suffix_first))
        return [tokenizer.bos] * 50

    monkeypatch.setattr("megacode.data.infill.infilling_document", record)
    infiller, source, counts = Infiller(tokenizer, 0.5, 0.5), Source("s", [tmp_path / "s"]), Counter()
    for epoch in range(2):
        for document in range(200):
            made.append(infiller.infilled(source, document, key_of(3, 1), epoch, 100, counts) is None)
    assert counts["irreversible"] == 0
    assert (ORDER, hashlib.sha256(repr(made).encode()).hexdigest()[:16]) == (2, "ad7603d6812b1374")
