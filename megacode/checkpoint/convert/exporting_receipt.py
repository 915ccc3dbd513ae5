"""The receipt of an export: `transformers` takes the folder and must compute what megacode computes."""

import json
from pathlib import Path
from typing import Any

import torch

from megacode.checkpoint.convert.compare import SEED, compare, finite, windows
from megacode.checkpoint.convert.exporting import config_of, special_ids
from megacode.checkpoint.convert.forward import MegacodeForward
from megacode.checkpoint.convert.grown import ROW_TENSORS
from megacode.checkpoint.convert.hf_source import wrong_ids
from megacode.checkpoint.convert.hf_tokenizer import FUZZ, compare_tokenizer, fuzzed_texts
from megacode.checkpoint.convert.receipt import Check, Hashes, Receipt, check_layout, finish
from megacode.checkpoint.convert.stored import SafetensorsFile, dtype_name
from megacode.checkpoint.convert.transformers_forward import TransformersForward
from megacode.checkpoint.convert.weights import Progress
from megacode.checkpoint.reader import DTYPES, CheckpointReader
from megacode.checkpoint.tensorfile import sha256
from megacode.data.tokenizer import Tokenizer

NUM_FUZZED = 2000


def check_export(
    checkpoint: CheckpointReader, folder: Path, texts: list[str], progress: Progress = lambda done, total: None
) -> Receipt:
    """Compare an exported folder with its checkpoint and write conversion_receipt.json into it.

    Both sides compute in fp32, layer by layer, with one weight in memory at a time: transformers with its own layers
    and what it makes of config.json. That it accepts the folder, names and shapes, is asked of the whole model.

    Args:
        checkpoint: where the export came from.
        folder: the export.
        texts: code to compare tokens and logits on.
        progress: called with steps done and steps to do.

    Raises:
        ConversionError: something disagrees. The receipt is written then as well and says the same.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = next((name for name, known in DTYPES.items() if str(known) == f"torch.{config['dtype']}"), "fp32")
    tokenizer = Tokenizer(checkpoint.tokenizer_path, oracle=True)
    files = {name: file for file in _open(folder) for name in file.shapes}
    rows = [(name, files[name].shapes[name][0]) for name in ROW_TENSORS if name in files]
    layout = check_layout(
        {name: checkpoint.shape(name) for name in checkpoint.names},
        {name: file.shapes[name] for name, file in files.items()},
        [*rows, ("config.json", config["vocab_size"])],
        tokenizer.vocabulary,
    )
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    wrong = [
        f"{name}: {found}"
        for name, settings in (("config.json", config), ("generation_config.json", generation))
        for found in wrong_ids(settings, tokenizer.vocabulary)
    ]
    expected = {**config_of(checkpoint.model, dtype), **special_ids(checkpoint)}
    checks = [layout, _check_config(expected, config, wrong), _check_tokenizer(tokenizer, folder, texts)]
    tensors: dict[str, Hashes] = {}
    if not layout.disagreements and not wrong:  # transformers makes no model with such an id
        theirs = TransformersForward(folder)
        layout.disagreements.extend(theirs.differences())
        values = Check("values", [])

        def look(name: str) -> bool:
            tensors[name], is_finite = _look(checkpoint, files[name], name, DTYPES[dtype], values)
            return is_finite

        tokens = windows(checkpoint.model, tokenizer, texts, tokenizer.vocabulary)
        ours = MegacodeForward(checkpoint, DTYPES[dtype])
        checks += [values, *compare(ours, theirs, checkpoint.model, tokens, tokenizer.vocabulary, look, progress)]
    return finish(folder, "to-hf", checks, tensors, step=checkpoint.step, dtype=dtype)


def _open(folder: Path) -> list[SafetensorsFile]:
    return [SafetensorsFile(path) for path in sorted(folder.glob("*.safetensors"))]


def _check_config(expected: dict[str, Any], config: dict[str, Any], wrong: list[str]) -> Check:
    differences = [
        f"{key} is {config.get(key)} in config.json and should be {value}"
        for key, value in expected.items()
        if config.get(key) != value
    ]
    return Check("config", differences + wrong)


def _check_tokenizer(tokenizer: Tokenizer, folder: Path, texts: list[str]) -> Check:
    differences = compare_tokenizer(tokenizer, folder, [*texts, *fuzzed_texts(NUM_FUZZED, SEED)])
    return Check("tokenizer", differences, {"texts": len(texts), "fuzzed_texts": NUM_FUZZED, "kinds": list(FUZZ)})


def _look(
    checkpoint: CheckpointReader, file: SafetensorsFile, name: str, dtype: torch.dtype, values: Check
) -> tuple[Hashes, bool]:
    """Compare a parameter: every byte where the type stayed, else every value.

    Also whether what is written is finite.
    """
    stored, written = checkpoint.read_stored(name), file.read(name)
    hashes = Hashes([sha256(stored)], sha256(written))
    if stored.dtype == written.dtype == dtype:
        same = hashes.source == [hashes.written]
    else:
        same = written.dtype == dtype and torch.equal(written, stored.to(dtype))
    if not same:
        values.disagreements.append(f"{name} holds other values")
    elif stored.dtype != dtype and (written.isinf() & stored.isfinite()).any():
        values.disagreements.append(
            f"{name} holds values that are too large for {dtype_name(dtype)}; use another --dtype"
        )
    return hashes, finite(written)
