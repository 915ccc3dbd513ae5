"""megacode.data.stream: training samples against the corpus, validation, and who takes which sample."""

import argparse
import inspect
import pickle
import random
import struct
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from megacode.data.counter import Purpose, chance, draw, key_of
from megacode.data.infill import infill
from megacode.data.shards import Shards, ShardWriter
from megacode.data.source import Source
from megacode.data.stream import IGNORE, TrainStream, ValidationStream, check, step_indices
from megacode.data.tokenizer import Tokenizer, train
from megacode.data.validation import unigram_entropy
from megacode.errors import UserError

SOURCE = inspect.getsource(argparse)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train([SOURCE], path, 800)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tokenizer):
    """200 pieces of source code of 1 to 600 characters, one of them in tokens that the tokenizer would not choose."""
    prefix = tmp_path_factory.mktemp("shard") / "train"
    generator = random.Random(0)
    with ShardWriter(prefix, tokenizer.vocabulary, tokenizer_sha256=tokenizer.sha256) as writer:
        for i in range(200):
            start = generator.randrange(len(SOURCE) - 600)
            text = SOURCE[start : start + generator.randrange(1, 600)]
            writer.add_document([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos])
            if i == 100:
                letters = [row for letter in "return" for row in tokenizer.encode_continuation(letter)]
                assert letters != tokenizer.encode_continuation("return")
                writer.add_document([tokenizer.bos, *letters, tokenizer.eos])
    return Shards(prefix)


def make(shards, tokenizer, **changes):
    options = {"sequence_length": 300, "seed": 3, "infilling_rate": 0.9, "suffix_first_rate": 0.5}
    return TrainStream([source_of(shards)], tokenizer, **(options | {"document_masks": True} | changes))


def source_of(shards):
    return Source(shards.prefix.name, [shards.prefix])


def windows(stream):
    return stream.cutters[0].windows


def count(stream, num_samples):
    return sum((stream.sample(number).counts for number in range(num_samples)), Counter())


def uncut_documents(shards, start, stop):
    starts = [shards.document_start(i) for i in range(shards.num_documents + 1)]
    return [i for i in range(shards.num_documents) if starts[i] >= start and starts[i + 1] <= stop]


def expected_infilling(stream, shards, tokenizer, epoch, document, rate):
    """What an uncut document is to become, by the definition; None where it is to stay."""
    key = windows(stream).key
    if not chance(draw(key_of(key, epoch, Purpose.WHETHER_TO_INFILL), document)[0], rate):
        return None
    body = shards.document(document)[1:-1].tolist()
    text = tokenizer.decode(body)
    if tokenizer.encode(text) != body:
        return None
    return infill(text, draw(key_of(key, epoch, Purpose.WHERE_TO_CUT), document, 3), tokenizer, 0.5)[0]


@pytest.mark.parametrize("sequence_length", [60, 300, 1500])
@pytest.mark.parametrize("rate", [0.0, 0.9, 1.0])
def test_a_sample_is_its_window_with_its_uncut_documents_infilled(shards, tokenizer, sequence_length, rate):
    stream = make(shards, tokenizer, sequence_length=sequence_length, infilling_rate=rate, document_masks=False)
    num_infilled = num_unfitting = 0
    counts = Counter()
    for number in range(3 * windows(stream).per_epoch):
        sample = stream.sample(number)
        counts += sample.counts
        ids = [*sample.tokens.tolist(), int(sample.labels[-1])]
        assert len(ids) == sequence_length + 1
        assert sample.labels[:-1].tolist() == sample.tokens[1:].tolist()
        epoch, start = windows(stream).locate(number)
        document = shards.document_at(start)
        infilled = np.zeros(sequence_length + 1, bool)
        place, corpus = 0, start
        if corpus > shards.document_start(document):
            document += 1
            place = min(len(ids), shards.document_start(document) - start)
            assert ids[:place] == shards.tokens(start, start + place).tolist(), "the cut document at the start is plain"
        begins = []
        while place < len(ids):
            plain = shards.document(document).tolist()
            goal = expected_infilling(stream, shards, tokenizer, epoch, document, rate)
            begins.append(place)
            if goal is not None and place + len(goal) <= len(ids):
                assert ids[place : place + len(goal)] == goal, "what fits is infilled, whole"
                infilled[place : place + len(goal)] = True
                place += len(goal)
                num_infilled += 1
            else:
                rest = ids[place : place + len(plain)]
                assert rest == plain[: len(rest)], "what is cut or was not chosen is plain"
                num_unfitting += goal is not None and len(rest) == len(plain)
                place += len(rest)
            document += 1
        assert sample.infilled.tolist() == infilled[1:].tolist()
        assert sample.document_starts.tolist() == [begin for begin in begins if begin < sequence_length]
    assert counts["infilled"] == num_infilled
    assert counts["unfitting"] == num_unfitting
    assert num_infilled > 50 or rate == 0
    assert num_infilled == 0 or rate > 0
    if rate == 1 and sequence_length > 60:
        assert num_infilled > 0.9 * counts["uncut"], "the rate is not eaten up by documents without room"


def test_the_last_document_is_cut_where_the_ones_before_it_grew(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "s", tokenizer.vocabulary, tokenizer_sha256=tokenizer.sha256) as writer:
        for _ in range(3):
            writer.add_document([tokenizer.bos, *tokenizer.encode("def f(): pass\n" * 5), tokenizer.eos])
    shards = Shards(tmp_path / "s")
    stream = make(shards, tokenizer, sequence_length=shards.num_tokens - 1, infilling_rate=1.0)
    sample = stream.sample(0)
    expected = [expected_infilling(stream, shards, tokenizer, 0, i, 1.0) for i in (0, 1)]
    flat = [*expected[0], *expected[1], *shards.document(2).tolist()]
    assert sample.tokens.tolist() == flat[: shards.num_tokens - 1]
    assert sample.counts == {"uncut": 2, "infilled": 2}


def test_documents_that_get_shorter(shards, tokenizer, monkeypatch):
    # Text seldom takes four tokens less when it is cut, but nothing forbids it: here all shrink to two tokens.
    monkeypatch.setattr("megacode.data.infill.infill", lambda *_: ([tokenizer.bos, tokenizer.eos], False))
    stream = make(shards, tokenizer, infilling_rate=1.0, document_masks=False)
    num_plain = num_longer = 0
    for number in range(windows(stream).per_epoch):
        sample = stream.sample(number)
        _, start = windows(stream).locate(number)
        window = shards.tokens(start, start + 300).tolist()
        num_plain += sample.tokens.tolist() == window
        num_longer += len(sample.document_starts) > window.count(tokenizer.bos)
    assert num_plain >= 1, "at the end of the corpus there is nothing to go on with"
    assert num_longer > 20, "elsewhere the sample goes on behind its window"


def test_a_sample_depends_on_its_number_alone(shards, tokenizer):
    numbers = list(range(0, 2000, 37))
    forward = make(shards, tokenizer).micro_batch(numbers)
    fresh = make(Shards(shards.prefix), tokenizer)
    for row in random.Random(1).sample(range(len(numbers)), len(numbers)):
        sample = fresh.sample(numbers[row])
        for name in ("tokens", "labels", "positions", "infilled"):
            assert np.array_equal(getattr(sample, name), getattr(forward, name)[row])
    other = make(shards, tokenizer, seed=4).micro_batch(numbers)
    assert not np.array_equal(other.tokens, forward.tokens)
    copy = pickle.loads(pickle.dumps(make(shards, tokenizer))).micro_batch(numbers)
    assert np.array_equal(copy.tokens, forward.tokens)


def test_document_masks_of_infilling_documents(shards, tokenizer):
    batch = make(shards, tokenizer, infilling_rate=1.0).micro_batch(range(20))
    begins = batch.tokens == tokenizer.bos
    begins[:, 0] = True
    assert np.array_equal(batch.positions == 0, begins)
    assert batch.cu_seqlens.tolist() == [*np.flatnonzero(begins), begins.size]
    assert not (batch.labels == tokenizer.bos).any()
    assert np.array_equal(batch.labels == IGNORE, np.roll(begins, -1, 1) & (np.arange(300) < 299) | (batch.labels < 0))
    assert (batch.labels[:, :-1] == IGNORE).sum() == begins[:, 1:].sum()
    ends = batch.labels == tokenizer.eot_id
    assert ends.any()
    assert (batch.labels[:, 1:][ends[:, :-1]] == tokenizer.eos).all(), "EOT is followed by EOS: no such document is cut"


def test_documents_that_do_not_come_back_stay_plain(shards, tokenizer):
    stream = make(shards, tokenizer, infilling_rate=1.0)
    counts = count(stream, windows(stream).per_epoch)
    assert counts["irreversible"] >= 1
    assert counts["uncut"] == counts["infilled"] + counts["unfitting"] + counts["irreversible"]


def test_a_text_with_the_sign_of_a_space_is_infilled_as_one_with_a_space(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "s", tokenizer.vocabulary) as writer:
        for text in ("▁a = 1▁▁\n", "def f(x):\n▁▁ return x▁", "▁") * 40:
            writer.add_document([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos])
    stream = make(Shards(tmp_path / "s"), tokenizer, sequence_length=100, infilling_rate=1.0)
    counts = count(stream, windows(stream).per_epoch)
    assert counts["irreversible"] == 0
    assert counts["infilled"] > 10


def test_a_shard_without_our_framing_is_never_infilled(tmp_path, tokenizer):
    documents = [tokenizer.encode(SOURCE[i * 50 : i * 50 + 50]) for i in range(50)]  # Megatron without --append-eod
    lengths = [len(document) for document in documents]
    with (tmp_path / "m.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ50i", b"MMIDIDX", 1, 8, 50, 51, *lengths))
        np.array([2 * sum(lengths[:i]) for i in range(50)] + list(range(51)), "<i8").tofile(file)
    np.concatenate(documents).astype("<u2").tofile(tmp_path / "m.bin")
    stream = make(Shards(tmp_path / "m"), tokenizer, sequence_length=100)
    batch = stream.micro_batch(range(10))
    assert not batch.infilled.any()
    assert batch.counts["irreversible"] > 10


@given(
    st.integers(0, 10),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 8).filter(lambda ranks: ranks in (1, 2, 3, 4, 6, 8)),
)
def test_a_step_has_the_same_samples_on_any_number_of_ranks(first, micro_samples, num_micro_batches, data_ranks):
    global_samples = micro_samples * num_micro_batches * data_ranks
    ranks = [step_indices(first, global_samples, micro_samples, data_ranks, rank) for rank in range(data_ranks)]
    assert all(len(batches) == num_micro_batches for batches in ranks)
    assert all(len(batch) == micro_samples for batches in ranks for batch in batches)
    found = sorted(index for batches in ranks for batch in batches for index in batch)
    assert found == list(range(first, first + global_samples))


def test_a_batch_that_ranks_cannot_share():
    with pytest.raises(UserError, match=r"batch\.global_samples \(10\).*batch\.micro_samples \(2\)"):
        step_indices(0, 10, 2, 2, 0)


@pytest.mark.parametrize("document_masks", [False, True])
@pytest.mark.parametrize("sequence_length", [1, 7, 100, 10**5])
def test_validation_predicts_every_token_once(tmp_path, document_masks, sequence_length):
    documents = [[1, *range(10, 10 + n), 2] for n in (0, 1, 5, 30, 57)]
    with ShardWriter(tmp_path / "v", 100) as writer:
        for document in documents:
            writer.add_document(document)
    shards = Shards(tmp_path / "v")
    stream = ValidationStream(source_of(shards), sequence_length=sequence_length, document_masks=document_masks)
    batch = stream.micro_batch(range(stream.num_samples + 2))
    predicted = batch.labels[batch.labels != IGNORE].tolist()
    flat = [token for document in documents for token in document]
    assert predicted == [token for token in flat[1:] if token != 1 or not document_masks]
    context = batch.tokens[batch.labels != IGNORE].tolist()
    assert context == [a for a, b in pairwise(flat) if b != 1 or not document_masks]
    assert (batch.labels[-2:] == IGNORE).all()
    assert (batch.labels[-3] != IGNORE).any()
    assert not batch.infilled.any()

    shares = np.unique(predicted, return_counts=True)[1] / len(predicted)
    assert unigram_entropy(shards, document_masks) == pytest.approx(-(shares * np.log(shares)).sum())


def test_check_refuses_what_does_not_belong_together(tmp_path, tokenizer):
    def shard(name, document, **options):
        with ShardWriter(tmp_path / name, 60000, **options) as writer:
            for _ in range(3 if document else 0):
                writer.add_document(document)
        return Shards(tmp_path / name)

    own = shard("own", [1, 5, 2], tokenizer_sha256=tokenizer.sha256)
    check(own, tokenizer)
    make(own, tokenizer, sequence_length=8)
    with pytest.raises(UserError, match=r"own has 9 tokens.*= 10"):
        make(own, tokenizer, sequence_length=9)
    with pytest.raises(UserError, match="foreign was made with another tokenizer"):
        check(shard("foreign", [1, 5, 2], tokenizer_sha256="0"), tokenizer)
    check(shard("unknown", [1, 815, 2]), tokenizer)
    with pytest.raises(UserError, match="large has token 816"):
        check(shard("large", [1, 816, 2]), tokenizer)
    with pytest.raises(UserError, match="nothing is empty"):
        check(shard("nothing", []), tokenizer)
    with pytest.raises(UserError, match="nothing has no token to predict"):
        ValidationStream(Source("nothing", [tmp_path / "nothing"]), sequence_length=8, document_masks=False)


def test_infilling_needs_its_pieces(tmp_path, tokenizer):
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer.path.read_bytes())
    del model.pieces[800:]
    (tmp_path / "base.model").write_bytes(model.SerializeToString())
    base = Tokenizer(tmp_path / "base.model")
    with ShardWriter(tmp_path / "s", base.vocabulary, tokenizer_sha256=base.sha256) as writer:
        writer.add_document([1, *range(500), 2])
    with pytest.raises(UserError, match=r"base\.model has no infilling pieces; set data\.infilling_rate to 0"):
        make(Shards(tmp_path / "s"), base)
    make(Shards(tmp_path / "s"), base, infilling_rate=0.0).sample(0)
