"""What computes a SentencePiece model's ids: SentencePiece itself, or fastokens, nine times as fast, where it agrees.

fastokens 0.3 (Apache-2.0) reads a tokenizer.json; `tokenizer_json.py` makes one of which it gives SentencePiece's ids.
It keeps no cache that grows with the text.
"""

import functools
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from megacode.data.tokenizer_json import refusal, tokenizer_json

Ids = NDArray[np.unsignedinteger[Any] | np.signedinteger[Any]]


@dataclass(frozen=True)
class Engine:
    """Who computes ids, and why."""

    name: str
    """Package and version."""
    reason: str
    """In words that follow the name."""
    document: Callable[[str], Ids]
    """Ids of a text with the dummy prefix: [tokens]. A text with lone surrogates raises UnicodeEncodeError."""
    continuation: Callable[[str], Ids]
    """Ids of a text without it: [tokens]."""


def fastest(model: Any, probes: Iterable[str], known: str = "") -> Engine:
    """fastokens where it is installed, can express the model and gives SentencePiece's ids on all probes.

    Args:
        model: A sentencepiece ModelProto.
        probes: Texts.
        known: Name of the engine that this function gave another process for the model: it is taken without probing,
            if it is installed here.
    """
    oracle = sentencepiece(model)
    if known == oracle.name:
        return sentencepiece(model, "as another process found")
    lacking = refusal(model)
    if lacking:
        return sentencepiece(model, f"fastokens needs {lacking}")
    try:
        engine = _fastokens(model)
    except ImportError:
        return sentencepiece(model, "fastokens, which is nine times as fast, is not installed")
    if known == engine.name:
        return engine
    # All pieces as well: where merging the best pair first does not lead to a piece, looking it up does.
    for text in (*probes, *(piece.piece for piece in model.pieces)):
        for mine, theirs in ((engine.document, oracle.document), (engine.continuation, oracle.continuation)):
            if not np.array_equal(mine(text), theirs(text)):
                return sentencepiece(model, f"{engine.name} gives {text!r} other ids")
    return engine


def sentencepiece(model: Any, reason: str = "the model's own") -> Engine:
    """SentencePiece itself.

    Args:
        model: A sentencepiece ModelProto.
        reason: Why no other.
    """
    document, continuation = processor(model, dummy_prefix=True), processor(model, dummy_prefix=False)

    def by(encoder: SentencePieceProcessor) -> Callable[[str], Ids]:
        # Bytes: of a str with lone surrogates SentencePiece complains without saying of what.
        return lambda text: np.array(encoder.encode(text.encode()), np.int32)

    return Engine(
        f"sentencepiece {importlib.metadata.version('sentencepiece')}",
        reason,
        by(document),
        by(continuation),
    )


def processor(model: Any, *, dummy_prefix: bool) -> SentencePieceProcessor:
    """A processor that puts a space in front of a text, or not.

    Code Llama's own trick for text without the dummy prefix (encode it behind a rare one-token character, drop two ids)
    needs that character in the vocabulary. The same model with the flag off is exact for any vocabulary.
    """
    own = sentencepiece_model_pb2.ModelProto()
    own.CopyFrom(model)
    # A model made without the prefix never gets one.
    own.normalizer_spec.add_dummy_prefix = dummy_prefix and model.normalizer_spec.add_dummy_prefix
    return SentencePieceProcessor(model_proto=own.SerializeToString())


def _fastokens(model: Any) -> Engine:
    import fastokens

    def by(dummy_prefix: bool, oracle: Callable[[str], Ids]) -> Callable[[str], Ids]:
        @functools.cache
        def encoder() -> Any:  # 0.4 s for 32,000 pieces, and preparing needs the one with the prefix only
            return fastokens.Tokenizer.from_json_str(tokenizer_json(model, dummy_prefix=dummy_prefix))

        def encode(text: str) -> Ids:
            # It looks up whole words before it merges, and finds the byte pieces by their names: "<0x0A>".
            if "<0x" in text:
                return oracle(text)
            # One text at a time: several would be spread over threads, which the processes that share a machine need.
            return np.frombuffer(encoder().encode_batch_flat([text])[0], np.uint32)

        return encode

    own = sentencepiece(model)
    name = f"fastokens {importlib.metadata.version('fastokens')}"
    return Engine(name, "as SentencePiece, and faster", by(True, own.document), by(False, own.continuation))
