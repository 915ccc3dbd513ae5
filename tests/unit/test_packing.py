"""megacode.data.packing and windows: labels, positions, boundaries; which windows there are and in what order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacode.data.packing import IGNORE, Piece, collate, join, padding
from megacode.data.windows import Windows


def piece(*ids, starts=True, infilled=False):
    return Piece(np.array(ids, np.int64), "PSM" if infilled else "whole", starts)


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


@pytest.mark.parametrize("document_masks", [False, True])
def test_what_is_not_to_be_predicted(document_masks):
    first = Piece(np.arange(10, 16), unpredicted=np.array([[0, 2], [4, 5]]))
    second = Piece(np.arange(20, 24), "cut", unpredicted=np.array([[0, 1]]))  # goes on from a piece elsewhere
    third = Piece(np.arange(30, 32))
    sample = join([first, second, third, padding(3)], 14, document_masks)
    start = IGNORE if document_masks else 30
    expected = [IGNORE, 12, 13, IGNORE, 15, IGNORE, 21, 22, 23, start, 31, IGNORE, IGNORE, IGNORE]
    assert sample.labels.tolist() == expected
    assert sample.document_starts.tolist() == [0, 6, 10, 12]
    assert sample.tokens.tolist() == [*range(10, 16), *range(20, 24), 30, 31, 0, 0]


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
