"""A SentencePiece BPE model as a HuggingFace tokenizer that gives the same ids.

`transformers` can convert a tokenizer.model itself, but its LlamaTokenizer rebuilds the pipeline with Metaspace, which
adds no dummy prefix to text that starts with a space: other ids than SentencePiece's. So tokenizer.json is made here,
and tokenizer_config.json names the plain class that takes it as it is.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from megacode.data.tokenizer import Tokenizer
from megacode.data.tokenizer_json import SPACE, merges, refusal, vocabulary
from megacode.errors import UserError


def write_tokenizer(model_file: Path, folder: Path, max_positions: int) -> None:
    """Write tokenizer.model (a copy), tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`.

    `AutoTokenizer.from_pretrained(folder)` then gives SentencePiece's ids, with BOS in front and no EOS behind, as Code
    Llama's. One difference is HuggingFace's convention: text that spells a control piece ("</s>") becomes its id.

    Args:
        model_file: a SentencePiece BPE model with byte fallback, identity normalisation and dummy prefix.
        folder: an existing folder.
        max_positions: the longest context, in tokens.

    Raises:
        UserError: `model_file` is none, or one that tokenizer.json cannot express.
    """
    proto = _read_proto(model_file)
    tokenizer = _backend(proto)
    shutil.copyfile(model_file, folder / "tokenizer.model")
    tokenizer.save(str(folder / "tokenizer.json"))
    trainer = proto.trainer_spec
    names = {"bos_token": trainer.bos_piece, "eos_token": trainer.eos_piece, "unk_token": trainer.unk_piece}
    others = [piece.piece for piece in proto.pieces if _is_special(piece) and piece.piece not in names.values()]
    special = {**names, "additional_special_tokens": others}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        **special,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special)


def _read_proto(model_file: Path) -> Any:
    """The model, in which Code Llama's infilling pieces are control pieces (its own file has them as normal ones)."""
    proto = Tokenizer(model_file).model
    lacking = refusal(proto)
    if lacking:
        raise UserError(f"{model_file}: a HuggingFace tokenizer with equal ids needs {lacking}; train it with megacode")
    return proto


def _is_special(piece: Any) -> bool:
    return piece.type in (piece.CONTROL, piece.UNKNOWN)


def _backend(proto: Any) -> Any:
    """The `tokenizers.Tokenizer` of a model."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors

    trainer = proto.trainer_spec
    rows = vocabulary(proto)
    bpe = models.BPE(vocab=rows, merges=merges(proto), unk_token=trainer.unk_piece, byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bos, bos_id = trainer.bos_piece, trainer.bos_id
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
    special = [piece.piece for piece in proto.pieces if _is_special(piece)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


FUZZ = {
    "leading and trailing spaces": [" ", "  ", "a", "\n"],
    "visible spaces": [SPACE, " ", "x", SPACE * 3],
    "emoji": ["\U0001f600", "\U0001f469\u200d\U0001f4bb", "\u263a\ufe0f", "\U0001f1eb\U0001f1f7", "e"],
    "line ends": ["\r\n", "\n", "\r", "    ", "\u2028", "x = 1"],
    "control characters": [chr(code) for code in (0, *range(1, 32), 127, 0x85, 0xFEFF)],
    "digits": ["0", "1", "23", "4567890", ".", "\u0663", "\u00b2"],
    "combining marks": ["\u0301", "\u0308", "e", "\u0e33", "\uac00", "\u1100"],
    "runs of spaces": [" " * 7, " " * 64, " " * 1000, "\t", "x"],
    "runs of one sign": ["-", "-" * 5, "=" * 17, "#" * 3, "(", "ab", "aba"],
    "names of pieces": ["<s>", "</s>", "<unk>", "<0x0A>", f"{SPACE}<PRE>", "<step>", " "],
    "anything": [chr(code) for code in (0x21, 0x41, 0xE9, 0x416, 0x4E2D, 0x5D0, 0xE000, 0xFFFD, 0x1F600, 0x10FFFF)],
}
"""Kinds of text on which tokenizers are known to differ, as the parts that `fuzzed_texts` strings together."""


def fuzzed_texts(count: int, seed: int) -> list[str]:
    """Texts of every kind of `FUZZ` in turn, a function of the seed."""
    draw = random.Random(seed)
    kinds = list(FUZZ.values())
    return ["".join(draw.choices(kinds[number % len(kinds)], k=draw.randint(1, 12))) for number in range(count)]


def compare_tokenizer(reference: Tokenizer, folder: Path, texts: list[str]) -> list[str]:
    """What differs between SentencePiece and the tokenizer that `transformers` loads from `folder`; empty: nothing.

    The rows, which of them are special, and for every text the ids (text is text here, also where it spells a special
    piece), the BOS in front and the text that comes back.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        return [f"transformers cannot load it ({' '.join(str(error).split())[:200]})"]
    rows = range(reference.vocabulary)
    differences = []
    if len(loaded) != len(rows):
        differences.append(f"it has {len(loaded)} rows and SentencePiece {len(rows)}")
    swapped = [row for row in rows if loaded.convert_ids_to_tokens(row) != reference.piece(row)]
    if swapped:
        differences.append(f"{len(swapped)} rows hold another piece, first row {swapped[0]}")
    special = {row for row in rows if reference.is_control(row)}
    if set(loaded.all_special_ids) != special:
        differences.append(f"special are rows {sorted(loaded.all_special_ids)} and should be {sorted(special)}")
    for text in texts:
        ids = reference.encode(text)
        if loaded(text, split_special_tokens=True, verbose=False).input_ids != [reference.bos, *ids]:
            differences.append(f"the ids of {text[:80]!r} differ")
            break
        if loaded.decode(ids) != reference.decode(ids):
            differences.append(f"the text that comes back from {text[:80]!r} differs")
            break
    return differences
