"""megacode.data.blocks: best-fit packing of shards, epoch by epoch, and the counts that are kept beside them."""

import argparse
import inspect
import pickle
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacode.data import blocks
from megacode.data.blocks import BestFit, count, count_samples, count_source, plan
from megacode.data.infill import Infiller
from megacode.data.packing import join
from megacode.data.shards import Shards, ShardWriter
from megacode.data.source import Source
from megacode.data.spans import SpansWriter
from megacode.data.tokenizer import Tokenizer, train

TEXT = inspect.getsource(argparse)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train([TEXT], path, 800)
    return Tokenizer(path)


def write(prefix, lengths, spans=None):
    """Documents in which each token tells its document and, modulo 50, its place."""
    with ShardWriter(prefix, 60_000) as writer, SpansWriter(prefix, writer.facts) as spans_writer:
        for number, length in enumerate(lengths):
            writer.add_document(100 * number % 50_000 + np.arange(length) % 50)
            spans_writer.add_document(spans[number] if spans else [])


def best_fit(source, length, tokenizer, rate=0.0, key=5):
    return BestFit(source, length, key, Infiller(tokenizer, rate, 0.5))


@given(st.lists(st.integers(0, 40), max_size=40), st.integers(1, 12), st.integers(0, 4))
def test_a_plan_has_every_token_once(lengths, sequence_length, reserve):
    lengths = np.array(lengths, np.int32)
    order = np.random.default_rng(0).permutation(len(lengths))
    found = plan(lengths, sequence_length, reserve, order)
    num_full = int(found.long_ends[-1]) if len(found.long) else 0
    assert count(lengths, sequence_length, reserve) == len(found.starts) - 1 + num_full
    assert sorted(found.items.tolist()) == np.flatnonzero(lengths).tolist()
    full = blocks.full_pieces(lengths, sequence_length)
    assert found.long.tolist() == np.flatnonzero(full).tolist()
    assert np.diff(found.long_ends, prepend=0).tolist() == full[full > 0].tolist()
    tails = lengths - full * sequence_length
    assert (tails[lengths > 0] <= sequence_length + 1).all()
    assert (tails[full > 0] > 1).all(), "the last piece of a cut document has something to predict"
    for first, stop in pairwise(found.starts.tolist()):
        items = found.items[first:stop]
        assert stop > first
        room = sequence_length + 1 - tails[items].sum()
        assert room >= min(reserve * (full[items] == 0).sum(), room + 1) or len(items) == 1


def predicted(sample):
    """(previous token, token) of each label."""
    found = sample.labels >= 0
    return list(zip(sample.tokens[found].tolist(), sample.labels[found].tolist(), strict=True))


@pytest.mark.parametrize("sequence_length", [1, 7, 20, 64])
@pytest.mark.parametrize("block", [4, 1 << 18])
def test_an_epoch_predicts_every_token_once(tmp_path, tokenizer, monkeypatch, sequence_length, block):
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "GROUP", 3)
    generator = random.Random(1)
    shards = [[generator.choice((1, 2, 5, 15, 21, 22, 90)) for _ in range(size)] for size in (11, 3, 24)]
    for number, lengths in enumerate(shards):
        write(tmp_path / str(number), lengths)
    source = Source("s", [tmp_path / str(number) for number in range(3)])
    cutter = best_fit(source, sequence_length, tokenizer)
    wanted = Counter(pair for i in range(source.num_documents) for pair in pairwise(source.document(i).tolist()))
    orders = []
    for epoch in range(3):
        found, order, counts = Counter(), [], Counter()
        for number in range(cutter.per_epoch):
            pieces = cutter.pieces(epoch * cutter.per_epoch + number, counts)
            sample = join(pieces, sequence_length, document_masks=True)
            found.update(predicted(sample))
            order.append(tuple((piece.document, piece.start) for piece in pieces))
            for piece in pieces:
                if piece.kind != "padding":
                    length = len(source.document(piece.document))
                    assert piece.ids.tolist() == source.document(piece.document)[piece.start : piece.stop].tolist()
                    assert (piece.kind == "whole") == (length <= sequence_length + 1), "no document is cut that fits"
        assert found == wanted
        assert counts["padding"] == sum(
            sequence_length + 1 - sum(len(p.ids) for p in cutter.pieces(n, Counter()) if p.document >= 0)
            for n in range(cutter.per_epoch)
        ), "how full samples are differs not between epochs"
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    copy = pickle.loads(pickle.dumps(cutter))
    assert [p.ids.tolist() for p in copy.pieces(5, Counter())] == [p.ids.tolist() for p in cutter.pieces(5, Counter())]


def test_neighbours_and_their_order_differ_between_epochs(tmp_path, tokenizer):
    write(tmp_path / "s", [10] * 60)
    cutter = best_fit(Source("s", [tmp_path / "s"]), 29, tokenizer)
    assert cutter.per_epoch == 20
    epochs = [{tuple(p.document for p in cutter.pieces(e * 20 + n, Counter())) for n in range(20)} for e in range(3)]
    assert len(epochs[0] & epochs[1]) + len(epochs[1] & epochs[2]) <= 2


def test_without_document_masks_a_cut_document_is_predicted_by_itself_alone(tmp_path, tokenizer):
    write(tmp_path / "s", [30, 8])
    cutter = best_fit(Source("s", [tmp_path / "s"]), 19, tokenizer)
    samples = [join(cutter.pieces(n, Counter()), 19, document_masks=False) for n in range(2)]
    labels = Counter(label for sample in samples for label in sample.labels.tolist() if label >= 0)
    assert labels[19] == 1, "the token that both pieces have is predicted once"
    packed = next(sample for sample in samples if (sample.labels < 0).any())
    assert {0, 19} == {packed.tokens[0], packed.tokens[8]} or {19, 100} <= set(packed.tokens.tolist())


def test_loss_spans_of_cut_documents(tmp_path, tokenizer):
    spans = [[(0, 2), (5, 9), (18, 25)], [], [(3, 4)]]
    write(tmp_path / "s", [30, 8, 12], spans)
    cutter = best_fit(Source("s", [tmp_path / "s"]), 9, tokenizer)
    found = Counter()
    for number in range(cutter.per_epoch):
        found.update(predicted(join(cutter.pieces(number, Counter()), 9, document_masks=True)))
    source = Source("s", [tmp_path / "s"])
    wanted = Counter(
        (a, b)
        for document in range(3)
        for place, (a, b) in enumerate(pairwise(source.document(document).tolist()), start=1)
        if not any(start <= place < stop for start, stop in spans[document])
    )
    assert found == wanted


def code(folder, tokenizer, spans=False):
    generator = random.Random(0)
    with (
        ShardWriter(folder / "code", tokenizer.vocabulary) as writer,
        SpansWriter(folder / "code", writer.facts) as spans_writer,
    ):
        for i in range(300):
            start = generator.randrange(len(TEXT) - 900)
            text = TEXT[start : start + generator.randrange(1, 900)]
            writer.add_document([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos])
            spans_writer.add_document([(0, 1)] if spans and i % 2 else [])
    return Source("code", [folder / "code"])


def test_infilling_never_cuts_and_seldom_lacks_room(tmp_path, tokenizer):
    source = code(tmp_path, tokenizer)
    cutter = best_fit(source, 300, tokenizer, rate=0.9)
    counts, seen = Counter(), Counter()
    for number in range(cutter.per_epoch):
        for piece in cutter.pieces(number, counts):
            if piece.kind != "padding":
                seen[piece.document] += 1
            if piece.infilled:
                assert piece.ids[-2:].tolist() == [tokenizer.eot_id, tokenizer.eos]
                text = tokenizer.decode(source.document(piece.document).tolist())
                assert sorted(tokenizer.decode(piece.ids.tolist()).replace(" ", "")) == sorted(text.replace(" ", ""))
    lengths = source.shard(0).lengths
    assert sorted(document for document in seen if seen[document] > 1) == np.flatnonzero(lengths > 301).tolist()
    assert counts["uncut"] == (lengths <= 301).sum()
    assert counts["infilled"] > 0.8 * counts["uncut"]
    assert counts["unfitting"] < 0.1 * counts["uncut"]


def test_documents_with_loss_spans_stay_plain(tmp_path, tokenizer):
    cutter = best_fit(code(tmp_path, tokenizer, spans=True), 300, tokenizer, rate=1.0)
    counts = Counter()
    pieces = [piece for number in range(cutter.per_epoch) for piece in cutter.pieces(number, counts)]
    assert counts["spanned"] > 50
    assert all(piece.document % 2 == 0 for piece in pieces if piece.infilled)
    assert all(piece.unpredicted is not None for piece in pieces if piece.document % 2 == 1 and piece.start == 0)


def test_starts_at_the_same_time_share_the_counting(tmp_path, monkeypatch):
    prefixes = [tmp_path / str(number) for number in range(30)]
    for number, prefix in enumerate(prefixes):
        write(prefix, [5 + number] * (number + 1))
    alone = [count(np.full(number + 1, 5 + number, np.int32), 28, 0) for number in range(30)]
    counted = []

    def slow(lengths, *rest):
        counted.append(len(lengths))
        time.sleep(0.01)
        return count(lengths, *rest)

    monkeypatch.setattr(blocks, "count", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: count_source(Source("s", prefixes), 28, 0), range(4)))
    assert [[each.tolist() for each in one] for one in found] == 4 * [[[samples] for samples in alone]]
    assert set(counted) == set(range(1, 31))
    assert len(counted) < 2 * 30, "each by itself would count 4 * 30"
    assert len(list(tmp_path.glob("*.tmp"))) == 0


def test_counts_are_kept_and_belong_to_their_shard(tmp_path, monkeypatch):
    write(tmp_path / "s", [10] * 60)
    path = tmp_path / "s.best_fit_29_0"
    assert count_samples(Shards(tmp_path / "s"), 29, 0).tolist() == [20]
    with monkeypatch.context() as patch:
        patch.setattr("megacode.data.blocks.count", None)
        assert count_samples(Shards(tmp_path / "s"), 29, 0).tolist() == [20], "they are read"
    whole = path.read_bytes()
    turned = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(len(whole))]
    for damage in (b"", b"another file", whole[:-3], whole[:60], whole + b"0", *turned):
        path.write_bytes(damage)
        assert count_samples(Shards(tmp_path / "s"), 29, 0).tolist() == [20]
        assert path.read_bytes() == whole
    write(tmp_path / "s", [10] * 59 + [11])
    assert count_samples(Shards(tmp_path / "s"), 29, 0).tolist() == [21], "the file is of another shard"
    assert count_samples(Shards(tmp_path / "s"), 29, 7).tolist() == [60], "the file is of no reserve"
    before = sorted(tmp_path.iterdir())

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("os.replace", refuse)
    assert count_samples(Shards(tmp_path / "s"), 28, 0).tolist() == [30], "where they can't be kept, too"
    assert sorted(tmp_path.iterdir()) == before
