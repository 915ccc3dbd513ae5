"""What a validation sees: windows of a shard in file order."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megacode.data.cutting import window
from megacode.data.packing import MicroBatch, Piece, Sample, collate, join, padding
from megacode.data.shards import Shards
from megacode.data.source import Source
from megacode.errors import UserError

_BLOCK_TOKENS = 1 << 20


class ValidationStream:
    """The samples of a validation: windows in file order, no infilling; every token but the first is predicted once.

    With document masks the first token of each document is not predicted either. Loss spans are left out.

    Attributes:
        num_samples: Samples of the whole corpus; the last one may be padded.

    Raises:
        UserError: the corpus has no token to predict.
    """

    def __init__(self, corpus: Source, *, sequence_length: int, document_masks: bool) -> None:
        if corpus.num_tokens < 2:
            raise UserError(f"the validation shard {corpus.name} has no token to predict; prepare one with documents")
        self.num_samples = -(-(corpus.num_tokens - 1) // sequence_length)
        self.corpus = corpus
        self._sequence_length = sequence_length
        self._document_masks = document_masks

    def sample(self, number: int) -> Sample:
        """Sample `number`. Labels past the corpus's end are IGNORE; past num_samples all of them are.

        Raises:
            UserError: the shard is damaged.
        """
        start = min(number * self._sequence_length, self.corpus.num_tokens)
        stop = min(start + self._sequence_length + 1, self.corpus.num_tokens)
        pieces: list[Piece] = window(self.corpus, start, stop)
        if sum(len(piece.ids) for piece in pieces) != stop - start:
            raise UserError(f"{self.corpus.name}.idx has lengths that do not fit its offsets; prepare the shard again")
        if rest := self._sequence_length + 1 - (stop - start):
            pieces.append(padding(rest))
        return join(pieces, self._sequence_length, self._document_masks)

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """The samples of these numbers, stacked; numbers from num_samples on fill up a last batch without any loss."""
        return collate([self.sample(index) for index in indices], self._document_masks)


def unigram_entropy(shards: Shards, document_masks: bool = False) -> float:
    """Entropy, in nats per token, of the tokens that `ValidationStream` predicts of a shard without loss spans.

    It is the loss of the best model that ignores the context. Reads the whole shard.
    """
    counts: Counter[int] = Counter()
    for start in range(1, shards.num_tokens, _BLOCK_TOKENS):
        block = np.bincount(shards.tokens(start, min(start + _BLOCK_TOKENS, shards.num_tokens)))
        ids = np.flatnonzero(block)
        counts.update(dict(zip(ids.tolist(), block[ids].tolist(), strict=True)))
    if document_masks:
        starts = shards.document_starts(0, shards.num_documents)[np.asarray(shards.lengths) > 0]
        for start in starts[1:].tolist():
            counts[int(shards.tokens(start, start + 1)[0])] -= 1
    shares = np.array([count for count in counts.values() if count]) / counts.total()
    return float(-(shares * np.log(shares)).sum())
