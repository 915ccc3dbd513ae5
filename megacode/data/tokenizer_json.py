"""A SentencePiece BPE model in the words of HuggingFace's tokenizer.json, so that other engines give the same ids.

`transformers`' own conversion rebuilds the pipeline with Metaspace, which adds no dummy prefix to text that starts with
a space, and other converters make text that spells "<s>" the piece: both give other ids than SentencePiece.
"""

import json
from typing import Any

SPACE = "\u2581"
"""SentencePiece's visible space."""


def refusal(proto: Any) -> str | None:
    """What a model lacks to be said as a tokenizer.json, in words that follow "it needs"; None: nothing.

    Args:
        proto: A sentencepiece ModelProto. Pieces that text must not reach are CONTROL or UNKNOWN.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    needed = {
        "model_type BPE": trainer.model_type == trainer.BPE,
        "byte fallback": trainer.byte_fallback,
        "identity normalisation": not normalizer.precompiled_charsmap,
        "a dummy prefix": normalizer.add_dummy_prefix and not trainer.treat_whitespace_as_suffix,
        "kept whitespace": not normalizer.remove_extra_whitespaces and normalizer.escape_whitespaces,
        "no user-defined pieces": all(piece.type != piece.USER_DEFINED for piece in proto.pieces),
    }
    return next((name for name, given in needed.items() if not given), None)


def merges(proto: Any) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, best score first.

    SentencePiece merges the adjacent pair whose union is the best-scored piece, wherever the union is split.
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    found = []
    for piece in sorted(scores, key=lambda name: -scores[name]):  # stable: equal scores stay in the order of ids
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found += [(left, right) for left, right in splits if left in scores and right in scores]
    return found


def vocabulary(proto: Any) -> dict[str, int]:
    """Piece -> row."""
    rows = {piece.piece: row for row, piece in enumerate(proto.pieces)}
    assert len(rows) == len(proto.pieces)
    return rows


def tokenizer_json(proto: Any, *, dummy_prefix: bool) -> str:
    """The tokenizer.json of a model that `refusal` lets pass. It knows no special tokens: text is text.

    Args:
        proto: A sentencepiece ModelProto.
        dummy_prefix: Whether a space is put in front of a text, as where a document begins.
    """
    prepend = [{"type": "Prepend", "prepend": SPACE}] if dummy_prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    model = {
        "type": "BPE",
        "unk_token": next(
            _unspellable(piece, row) for row, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN
        ),
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {_unspellable(piece, row): row for row, piece in enumerate(proto.pieces)},
        "merges": merges(proto),
    }
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": None,
            "model": model,
        }
    )


def _unspellable(piece: Any, row: int) -> str:
    """A piece's name, and for one that text must not reach a name that no text has once spaces are made visible.

    fastokens looks up whole words before it merges: "<reserved_5>" would become that piece.
    """
    return f"control {row}" if piece.type in (piece.CONTROL, piece.UNKNOWN) else piece.piece
