"""What a training step and a validation see: sample n as a pure function of (seed, n), in memory that does not grow."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from megacode.data.counter import Purpose, chance, draw
from megacode.data.infill import infill
from megacode.data.packing import IGNORE, Int64Array, MicroBatch, Piece, Sample, collate, join
from megacode.data.shards import Shards
from megacode.data.tokenizer import Tokenizer
from megacode.data.windows import Windows
from megacode.errors import UserError

__all__ = [
    "IGNORE",
    "MicroBatch",
    "Sample",
    "TrainStream",
    "ValidationStream",
    "check",
    "step_indices",
    "unigram_entropy",
]

_BLOCK_TOKENS = 1 << 20


class TrainStream:
    """Samples of a training run.

    A sample is a window of the corpus in which documents that no end of the sample cuts become infilling documents
    (Code Llama section 2.3: only documents that are not cut across contexts). They are longer than they were, so what
    follows them is cut earlier than the window's end; but only a plain document is ever cut. The few tokens that are
    pushed out are not seen in that epoch; other epochs cut elsewhere.

    Attributes:
        windows: Which stretches of the corpus the samples are.
        sources: Names of what the samples come from: of the shard, as yet.
        counts: What was met since the stream was made: documents `uncut`, of these `infilled`, `irreversible` (their
            ids do not come back from their text) and `unfitting` (as infilling documents they would be cut).

    Raises:
        UserError: infilling is asked of a tokenizer that has no infilling pieces.
    """

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        seed: int,
        infilling_rate: float,
        suffix_first_rate: float,
        document_masks: bool,
    ) -> None:
        check(shards, tokenizer, sequence_length)
        if infilling_rate > 0 and not tokenizer.has_infilling:
            raise UserError(f"the tokenizer {tokenizer.path} has no infilling pieces; set data.infilling_rate to 0")
        self.windows = Windows(shards.num_tokens, sequence_length, seed)
        self.sources = (shards.prefix.name,)
        self.counts: Counter[str] = Counter()
        self.shards = shards
        self._tokenizer = tokenizer
        self._infilling_rate = infilling_rate
        self._suffix_first_rate = suffix_first_rate
        self._document_masks = document_masks

    def sample(self, number: int) -> Sample:
        """Sample `number` of the run: the same wherever and whenever it is asked for."""
        epoch, start = self.windows.locate(number)
        return join(self._pieces(start, epoch), self.windows.sequence_length, self._document_masks)

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """The samples of these numbers, stacked."""
        return collate([self.sample(index) for index in indices], self._document_masks)

    def _pieces(self, start: int, epoch: int) -> list[Piece]:
        """The pieces of the sample that starts at a token of the corpus: sequence_length + 1 tokens in all."""
        room = self.windows.sequence_length + 1
        pieces: list[Piece] = []
        for document, low, high in _overlaps(self.shards, start, self.shards.num_tokens):
            piece = _piece(self.shards, low, max(low, start), min(high, max(low, start) + room))
            if low >= start and high - low <= room and (ids := self._infilled(document, epoch)) is not None:
                fits = len(ids) <= room
                self.counts["infilled" if fits else "unfitting"] += 1
                piece = Piece(ids, starts=True, infilled=True) if fits else piece
            pieces.append(piece)
            room -= len(piece.ids)
            if not room:
                return pieces
        # Documents got shorter, which is rare, and the corpus is at its end: there is nothing to go on with.
        return _plain(self.shards, start, start + self.windows.sequence_length + 1)

    def _infilled(self, document: int, epoch: int) -> Int64Array | None:
        """The infilling document that an uncut document becomes; None where it stays plain."""
        self.counts["uncut"] += 1
        seed, tokenizer = self.windows.seed, self._tokenizer
        if not chance(draw(seed, epoch, Purpose.WHETHER_TO_INFILL, document, 1)[0], self._infilling_rate):
            return None
        ids = self.shards.document(document).tolist()
        text = tokenizer.decode(ids[1:-1])
        if not text or [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] != ids:
            self.counts["irreversible"] += 1
            return None
        rate = self._suffix_first_rate
        ids = infill(text, seed=seed, epoch=epoch, document=document, tokenizer=tokenizer, suffix_first_rate=rate)
        return np.array(ids, np.int64)


class ValidationStream:
    """The samples of a validation: windows in file order, no infilling; every token but the first is predicted once.

    With document masks the first token of each document is not predicted either.

    Attributes:
        num_samples: Samples of the whole corpus; the last one may be padded.

    Raises:
        UserError: the corpus has no token to predict.
    """

    def __init__(self, shards: Shards, *, sequence_length: int, document_masks: bool) -> None:
        if shards.num_tokens < 2:
            raise UserError(f"the validation shard {shards.prefix} has no token to predict; prepare one with documents")
        self.num_samples = -(-(shards.num_tokens - 1) // sequence_length)
        self.shards = shards
        self._sequence_length = sequence_length
        self._document_masks = document_masks

    def sample(self, number: int) -> Sample:
        """Sample `number`. Labels past the corpus's end are IGNORE; past num_samples all of them are."""
        start = min(number * self._sequence_length, self.shards.num_tokens)
        stop = min(start + self._sequence_length + 1, self.shards.num_tokens)
        pieces = _plain(self.shards, start, stop)
        padding = self._sequence_length + 1 - (stop - start)
        pieces.append(Piece(np.zeros(padding, np.int64), starts=False))
        sample = join(pieces, self._sequence_length, self._document_masks)
        sample.labels[max(0, stop - start - 1) :] = IGNORE
        return sample

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """The samples of these numbers, stacked; numbers from num_samples on fill up a last batch without any loss."""
        return collate([self.sample(index) for index in indices], self._document_masks)


def step_indices(
    first: int, global_samples: int, micro_samples: int, data_ranks: int, data_rank: int
) -> list[list[int]]:
    """The samples of one step on one data rank, micro-batch by micro-batch.

    Over all data ranks they are `first` and the global_samples - 1 that follow, each once, whatever the number of ranks
    and the size of a micro-batch.

    Raises:
        UserError: the ranks cannot share the batch evenly.
    """
    if global_samples % (micro_samples * data_ranks):
        raise UserError(
            f"batch.global_samples ({global_samples}) must be a multiple of batch.micro_samples ({micro_samples}) "
            f"times the data ranks ({data_ranks}); change one of them"
        )
    mine = range(first + data_rank * micro_samples, first + global_samples, micro_samples * data_ranks)
    return [list(range(start, start + micro_samples)) for start in mine]


def check(shards: Shards, tokenizer: Tokenizer, sequence_length: int) -> None:
    """Refuse a shard that cannot be trained on. For a shard without PREFIX.json only its first tokens are looked at.

    Raises:
        UserError: another tokenizer made the shard, or it has fewer than sequence_length + 1 tokens.
    """
    if shards.num_tokens == 0:
        raise UserError(f"the shard {shards.prefix} is empty; prepare one with documents")
    if shards.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise UserError(
            f"the shard {shards.prefix} was made with another tokenizer than {tokenizer.path}; "
            "prepare it again, or name its own tokenizer"
        )
    largest = int(shards.tokens(0, min(_BLOCK_TOKENS, shards.num_tokens)).max())
    if largest >= tokenizer.vocabulary:
        raise UserError(
            f"the shard {shards.prefix} has token {largest} and the tokenizer {tokenizer.path} only "
            f"{tokenizer.vocabulary} rows; name the tokenizer that made it"
        )
    if shards.num_tokens <= sequence_length:
        raise UserError(
            f"the shard {shards.prefix} has {shards.num_tokens} tokens, not enough for one sequence of "
            f"batch.sequence_length + 1 = {sequence_length + 1}; prepare more text or shorten the sequence"
        )


def unigram_entropy(shards: Shards, document_masks: bool = False) -> float:
    """Entropy, in nats per token, of the tokens that `ValidationStream` predicts.

    It is the loss of the best model that ignores the context. Reads the whole shard.
    """
    counts: Counter[int] = Counter()
    for start in range(1, shards.num_tokens, _BLOCK_TOKENS):
        block = np.bincount(shards.tokens(start, min(start + _BLOCK_TOKENS, shards.num_tokens)))
        ids = np.flatnonzero(block)
        counts.update(dict(zip(ids.tolist(), block[ids].tolist(), strict=True)))
    if document_masks:
        counts.subtract(
            int(shards.tokens(low, high)[0]) for _, low, high in _overlaps(shards, 0, shards.num_tokens) if low
        )
    shares = np.array([count for count in counts.values() if count]) / counts.total()
    return float(-(shares * np.log(shares)).sum())


def _overlaps(shards: Shards, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The documents that have a token in start..stop-1: number, where it starts, where it ends."""
    if start == stop:
        return
    document = shards.document_at(start)
    low = shards.document_start(document)
    while low < stop:
        high = shards.document_start(document + 1)
        if low < high:  # Megatron's files may hold empty documents
            yield document, low, high
        document, low = document + 1, high


def _plain(shards: Shards, start: int, stop: int) -> list[Piece]:
    return [_piece(shards, low, max(low, start), min(high, stop)) for _, low, high in _overlaps(shards, start, stop)]


def _piece(shards: Shards, document_start: int, start: int, stop: int) -> Piece:
    return Piece(shards.tokens(start, stop).astype(np.int64), starts=start == document_start)
