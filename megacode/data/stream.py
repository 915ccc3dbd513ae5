"""What a training step sees: sample n as a pure function of (recipe, seed, n), in memory that does not grow."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megacode.data.blocks import BestFit
from megacode.data.counter import key_of
from megacode.data.cutting import Concatenated, Cutter
from megacode.data.infill import Infiller
from megacode.data.mixture import Mixture
from megacode.data.packing import IGNORE, Int64Array, Kind, MicroBatch, Piece, Sample, collate, join
from megacode.data.shards import Shards
from megacode.data.source import OpenShards, Source, find_shards
from megacode.data.tokenizer import Tokenizer
from megacode.data.validation import ValidationStream
from megacode.errors import UserError
from megacode.recipe import DataSection, SourceSection

ORDER = 2
"""Version of which samples a run sees in which order; a checkpoint that counts by another can't be gone on with."""

__all__ = ["IGNORE", "ORDER", "MicroBatch", "Part", "Sample", "TrainStream", "ValidationStream", "check", "open_train",
           "open_valid", "step_indices"]  # fmt: skip

Packing = Literal["concatenate", "best_fit"]

_LOOK_TOKENS = 1 << 16
"""Tokens of a shard of unknown origin that a start looks at."""


@dataclass(frozen=True)
class Part:
    """A stretch of a sample, and what it was made of."""

    kind: Kind
    source: str | None
    """None for padding, as all that follows."""
    prefix: Path | None
    """The shard."""
    document: int | None
    """Number in the shard."""
    start: int
    """First token of the document; an infilling document is made of all of them."""
    stop: int
    """The token that it ends before."""
    ids: Int64Array  # [tokens]
    unpredicted: list[tuple[int, int]]
    """Stretches of `ids` that have no loss."""
    cuts: tuple[int, int] | None = None
    """Of an infilling document: the characters of its text that the middle begins with and ends before."""


class TrainStream:
    """Samples of a training run: a blend of sources, each cut into samples and infilled by itself.

    It can be pickled; what it keeps open is opened again.

    Args:
        corpora: The sources.
        weights: How they are blended (see `Mixture`).
        packing: How they are cut (see `Concatenated`, `BestFit`).
        infilling_rate, suffix_first_rate: See `Infiller`.

    Attributes:
        corpora: As given.
        sources: Their names.
        mixture: How they are blended.
        num_tokens: Of all of them.

    Raises:
        UserError: infilling is asked of a tokenizer that has no infilling pieces, a weight is too small, or a source is
            too short for one sample.
    """

    def __init__(
        self,
        corpora: Sequence[Source],
        tokenizer: Tokenizer,
        *,
        weights: Sequence[float] = (1.0,),
        sequence_length: int,
        seed: int,
        packing: Packing = "concatenate",
        infilling_rate: float,
        suffix_first_rate: float,
        document_masks: bool,
    ) -> None:
        self.corpora = tuple(corpora)
        self.sources = tuple(corpus.name for corpus in corpora)
        self.num_tokens = sum(corpus.num_tokens for corpus in corpora)
        self.mixture = Mixture(self.sources, weights)
        self.sequence_length = sequence_length
        self.packing = packing
        self._vocabulary = tokenizer.vocabulary
        self._document_masks = document_masks
        self._infiller = infiller = Infiller(tokenizer, infilling_rate, suffix_first_rate)
        self._keys = [key_of(seed, number) for number in range(len(corpora))]
        make: type[Concatenated] | type[BestFit] = BestFit if packing == "best_fit" else Concatenated
        for corpus in corpora:
            if corpus.num_tokens <= sequence_length:
                raise UserError(
                    f"the source {corpus.name} has {corpus.num_tokens} tokens, not enough for one sequence of "
                    f"batch.sequence_length + 1 = {sequence_length + 1}; prepare more text or shorten the sequence"
                )
        self.cutters: tuple[Cutter, ...] = tuple(
            make(corpus, sequence_length, key, infiller) for corpus, key in zip(corpora, self._keys, strict=True)
        )

    def sample(self, number: int) -> Sample:
        """Sample `number` of the run: the same wherever and whenever it is asked for.

        Raises:
            UserError: a shard is damaged.
        """
        counts: Counter[str] = Counter()
        source, pieces = self._pieces(number, counts)
        if sum(len(piece.ids) for piece in pieces) != self.sequence_length + 1:
            where = f"from {self._where(source, pieces[0])} on" if pieces else f"in the source {self.sources[source]}"
            raise UserError(f"{where} documents have not the lengths that the .idx says; prepare the shard again")
        sample = join(pieces, self.sequence_length, self._document_masks)
        lowest, highest = int(sample.tokens.min()), max(int(sample.tokens.max()), int(sample.labels[-1]))
        if not 0 <= lowest <= highest < self._vocabulary:
            self._refuse(source, pieces)
        return replace(sample, source=source, counts=counts)

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """The samples of these numbers, stacked."""
        return collate([self.sample(index) for index in indices], self._document_masks)

    def explain(self, number: int) -> list[Part]:
        """What sample `number` is made of, in order: sequence_length + 1 tokens, of which the last is a label only."""
        source, pieces = self._pieces(number, Counter())
        _, epoch = self.locate(number)
        return [self._part(source, piece, epoch) for piece in pieces]

    def locate(self, number: int) -> tuple[int, int]:
        """The source of sample `number`, and in which of its epochs the sample lies."""
        source, own_number = self.mixture.locate(number)
        return source, own_number // self.cutters[source].per_epoch

    def facts(self) -> dict[str, dict[str, Any]]:
        """What the meaning of samples' numbers depends on: source -> weight, num_tokens, samples_per_epoch, hash."""
        return {
            corpus.name: {
                "weight": weight,
                "num_tokens": corpus.num_tokens,
                "samples_per_epoch": cutter.per_epoch,
                "hash": corpus.identity,
            }
            for corpus, weight, cutter in zip(self.corpora, self.mixture.weights, self.cutters, strict=True)
        }

    def epochs(self, num_samples: int) -> list[float]:
        """How often the first samples of a run go through each source."""
        counts = self.mixture.counts(num_samples)
        return [count / cutter.per_epoch for count, cutter in zip(counts, self.cutters, strict=True)]

    def _pieces(self, number: int, counts: Counter[str]) -> tuple[int, list[Piece]]:
        source, own_number = self.mixture.locate(number)
        return source, self.cutters[source].pieces(own_number, counts)

    def _part(self, source: int, piece: Piece, epoch: int) -> Part:
        spans = [] if piece.unpredicted is None else [(int(a), int(b)) for a, b in piece.unpredicted if a < b]
        if piece.kind == "padding":
            return Part(piece.kind, None, None, None, 0, len(piece.ids), piece.ids, spans)
        corpus = self.corpora[source]
        shard, document = corpus.shard_of(piece.document)
        prefix = corpus.prefixes[shard]
        cuts = self._infiller.cuts(corpus, piece.document, self._keys[source], epoch) if piece.infilled else None
        return Part(piece.kind, corpus.name, prefix, document, piece.start, piece.stop, piece.ids, spans, cuts)

    def _where(self, source: int, piece: Piece) -> str:
        corpus = self.corpora[source]
        shard, document = corpus.shard_of(piece.document)
        return f"document {document} of {corpus.prefixes[shard]}"

    def _refuse(self, source: int, pieces: list[Piece]) -> None:
        """Raise for the first token that is no row of the vocabulary."""
        for piece in pieces:
            for token in piece.ids.tolist():
                if not 0 <= token < self._vocabulary:
                    raise UserError(
                        f"{self._where(source, piece)} has token {token} and the tokenizer has {self._vocabulary} "
                        "rows: the shard is damaged (`megacode data verify` says where), or another tokenizer made it"
                    )


def open_train(data: DataSection, tokenizer: Tokenizer, sequence_length: int, seed: int) -> TrainStream:
    """The training stream of a recipe.

    Raises:
        UserError: shards are missing, damaged, too short or of another tokenizer; names the shard.
    """
    sections = data.train
    if isinstance(sections, str):
        sections = [SourceSection(name=Path(sections).name, weight=1.0, shards=[sections])]
    pool, seen = OpenShards(), dict[Path, str]()
    corpora = []
    for section in sections:
        prefixes = find_shards(section.shards)
        for prefix in prefixes:
            if (other := seen.setdefault(prefix.absolute(), section.name)) != section.name or prefixes.count(
                prefix
            ) > 1:
                raise UserError(f"data.train: the shard {prefix} stands in {other} and again in {section.name}")
        corpora.append(Source(section.name, prefixes, pool, lambda shards: check(shards, tokenizer)))
    return TrainStream(
        corpora, tokenizer, weights=[section.weight for section in sections], sequence_length=sequence_length,
        seed=seed, packing=data.packing, infilling_rate=data.infilling_rate,
        suffix_first_rate=data.suffix_first_rate, document_masks=data.document_masks,
    )  # fmt: skip


def open_valid(data: DataSection, tokenizer: Tokenizer, sequence_length: int) -> ValidationStream | None:
    """The validation stream of a recipe, if it names one.

    Raises:
        UserError: the shard is missing, damaged or of another tokenizer.
    """
    if data.valid is None:
        return None
    prefix = Path(data.valid)
    corpus = Source(data.valid, [prefix], check=lambda shards: check(shards, tokenizer))
    return ValidationStream(corpus, sequence_length=sequence_length, document_masks=data.document_masks)


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


def check(shards: Shards, tokenizer: Tokenizer) -> None:
    """Refuse a shard that cannot be trained on. Only where its tokenizer is unknown, its first tokens are looked at.

    Raises:
        UserError: it is empty, or another tokenizer made it.
    """
    if shards.num_tokens == 0:
        raise UserError(f"the shard {shards.prefix} is empty; prepare one with documents")
    if shards.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise UserError(
            f"the shard {shards.prefix} was made with another tokenizer than {tokenizer.path}; "
            "prepare it again, or name its own tokenizer"
        )
    if shards.tokenizer_sha256 is not None:
        return
    largest = int(np.max(shards.tokens(0, min(_LOOK_TOKENS, shards.num_tokens))))
    if largest >= tokenizer.vocabulary:
        raise UserError(
            f"the shard {shards.prefix} has token {largest} and the tokenizer {tokenizer.path} only "
            f"{tokenizer.vocabulary} rows; name the tokenizer that made it"
        )
