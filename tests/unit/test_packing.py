"""megacode.data.packing and windows: labels, positions, boundaries; which windows there are and in what order."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacode.data.counter import Purpose, draw
from megacode.data.packing import IGNORE, Piece, collate, join
from megacode.data.windows import Windows, permute


def piece(*ids, starts=True, infilled=False):
    return Piece(np.array(ids, np.int64), starts, infilled)


WINDOW = [piece(8, 9, 2, starts=False), piece(1, 5, 2), piece(1, 6, 2, infilled=True), piece(1, 7)]  # 11 tokens


def test_without_document_masks_every_label_counts():
    sample = join(WINDOW, 10, document_masks=False)
    assert sample.tokens.tolist() == [8, 9, 2, 1, 5, 2, 1, 6, 2, 1]
    assert sample.labels.tolist() == [9, 2, 1, 5, 2, 1, 6, 2, 1, 7]
    assert sample.positions.tolist() == list(range(10))
    assert sample.document_starts.tolist() == [3, 6, 9]
    assert np.flatnonzero(sample.infilled).tolist() == [5, 6, 7]
    assert collate([sample, sample], document_masks=False).cu_seqlens is None


def test_with_document_masks_documents_know_nothing_of_each_other():
    sample = join(WINDOW, 10, document_masks=True)
    assert sample.tokens.tolist() == [8, 9, 2, 1, 5, 2, 1, 6, 2, 1]
    assert sample.labels.tolist() == [9, 2, IGNORE, 5, 2, IGNORE, 6, 2, IGNORE, 7]
    assert sample.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert np.flatnonzero(sample.infilled).tolist() == [6, 7]
    batch = collate([sample, sample], document_masks=True)
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 9, 10, 13, 16, 19, 20]
    assert batch.cu_seqlens.dtype == np.int32
    assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == batch.infilled.shape == (2, 10)
    assert {batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype} == {np.dtype(np.int64)}
    assert batch.infilled.dtype == np.bool_


def test_a_document_that_starts_at_either_end_of_a_window():
    sample = join([piece(1, 5, 2), piece(1)], 3, document_masks=True)
    assert sample.labels.tolist() == [5, 2, IGNORE]
    assert sample.document_starts.tolist() == [0], "the last token is a label only"
    assert collate([sample], document_masks=True).cu_seqlens.tolist() == [0, 3]


def test_a_piece_cut_down_to_nothing_starts_no_document():
    sample = join([piece(1, 5, 2, infilled=True), piece()], 2, document_masks=True)
    assert (sample.labels.tolist(), sample.document_starts.tolist()) == ([5, 2], [0])


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 400), st.integers(0, 3))
def test_permute_is_a_permutation(size, epoch):
    keys = draw(0, epoch, Purpose.PERMUTATION, 0, 8)
    assert sorted(permute(i, size, keys) for i in range(size)) == list(range(size))


def test_permute_is_uniform_enough():
    size, num_keys = 50, 2000
    found = np.zeros((size, size))
    followers = 0
    for epoch in range(num_keys):
        keys = draw(3, epoch, Purpose.PERMUTATION, 0, 8)
        order = [permute(i, size, keys) for i in range(size)]
        found[range(size), order] += 1
        followers += sum(b == a + 1 for a, b in pairwise(order))
    expected = num_keys / size
    chi2 = ((found - expected) ** 2 / expected).sum()
    assert chi2 < 2620, "(50-1)^2 = 2401 degrees of freedom, standard deviation 69: above 2620 has probability 0.1 %"
    # Neighbours that stay neighbours: (size - 1)/size a permutation, variance about 1.
    assert abs(followers / num_keys - (size - 1) / size) < 3.3 / num_keys**0.5


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 40), st.integers(0, 400), st.integers(0, 2**70))
def test_every_epoch_visits_every_window_once(sequence_length, extra_tokens, seed):
    windows = Windows(sequence_length + 1 + extra_tokens, sequence_length, seed)
    for epoch in range(3):
        found = [windows.locate(epoch * windows.per_epoch + i) for i in range(windows.per_epoch)]
        assert {e for e, _ in found} == {epoch}
        starts = sorted(start for _, start in found)
        assert np.diff(starts).tolist() == [sequence_length] * (windows.per_epoch - 1)
        assert 0 <= starts[0] < sequence_length
        assert starts[-1] + sequence_length + 1 <= windows.num_tokens
        left_out = windows.num_tokens - 1 - windows.per_epoch * sequence_length
        assert left_out < 2 * sequence_length, "more than a window at each end is left out"


def test_epochs_differ_in_offset_and_order():
    windows = Windows(100_000, 64, 5)
    epochs = [[windows.locate(e * windows.per_epoch + i)[1] for i in range(50)] for e in range(20)]
    offsets = {starts[0] % 64 for starts in epochs}
    assert len(offsets) > 10
    assert len({tuple(start // 64 for start in starts) for starts in epochs}) == 20


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_offsets_occur(size):
    windows = Windows(size * 8 + 1, 8, 0)
    room = windows.num_tokens - 1 - windows.per_epoch * 8
    offsets = {min(windows.locate(e * windows.per_epoch + i)[1] for i in range(windows.per_epoch)) for e in range(200)}
    assert offsets == set(range(min(8, room + 1)))
