"""Random tokens in real shards, and a tokenizer of any size for them: what a benchmark's data path reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megacode.data.shards import ShardWriter
from megacode.data.tokenizer import NUM_APPENDED_ROWS, Tokenizer, train

MOST_PIECES = 1024
"""Of the tokenizer that is trained; the other rows are never used by a text."""
LONGEST_DOCUMENT = 6000


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """A tokenizer with so many rows: some trained on Python sources of the standard library, the others unused."""
    from sentencepiece import sentencepiece_model_pb2

    train(_sources(), path, num_pieces=min(MOST_PIECES, vocabulary - NUM_APPENDED_ROWS))
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    for row in range(len(model.pieces), vocabulary):
        piece = model.pieces.add()
        piece.piece, piece.type = f"<unused_{row}>", sentencepiece_model_pb2.ModelProto.SentencePiece.UNUSED
    model.trainer_spec.vocab_size = vocabulary
    path.write_bytes(model.SerializeToString(deterministic=True))


def write_shards(prefix: Path, tokenizer: Tokenizer, num_tokens: int) -> None:
    """At least so many random tokens, small ids being more frequent so that there is something to learn."""
    generator = np.random.default_rng(0)
    with ShardWriter(prefix, tokenizer.vocabulary, tokenizer_sha256=tokenizer.sha256, source="random") as writer:
        while writer.num_tokens < num_tokens:
            size = int(generator.integers(100, LONGEST_DOCUMENT))
            ids = 3 + (generator.random(size) ** 3 * (tokenizer.vocabulary - 3)).astype(np.int64)
            writer.add_document(np.concatenate([[tokenizer.bos], ids, [tokenizer.eos]]))


def _sources() -> Iterator[str]:
    for path in sorted(Path(sys.modules["json"].__file__ or "").parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if text.isascii():
            yield text
