"""The receipt of a converted checkpoint: the written files must hold, and megacode compute, what the source does."""

from pathlib import Path

import torch

from megacode.checkpoint.convert.compare import compare, finite, windows
from megacode.checkpoint.convert.forward import Forward, MegacodeForward
from megacode.checkpoint.convert.grown import ROW_TENSORS, Grown
from megacode.checkpoint.convert.hf_source import tokenizer_rows
from megacode.checkpoint.convert.library import read_by_library
from megacode.checkpoint.convert.receipt import Check, Hashes, Receipt, check_layout, finish
from megacode.checkpoint.convert.source import Source, shapes_of, warnings_of
from megacode.checkpoint.convert.stored import SafetensorsFile, dtype_name
from megacode.checkpoint.convert.weights import Progress
from megacode.checkpoint.reader import CheckpointReader
from megacode.checkpoint.tensorfile import sha256
from megacode.data.tokenizer import Tokenizer, find_fault

NUM_FUZZED = 200


def check_import(
    source: Source,
    reference: Forward,
    folder: Path,
    texts: list[str],
    progress: Progress = lambda done, total: None,
) -> Receipt:
    """Compare a converted checkpoint with its source and write conversion_receipt.json into it.

    Args:
        source: what was converted.
        reference: the forward of the source's own files.
        folder: the checkpoint.
        texts: code to compare logits on.
        progress: called with steps done and steps to do.

    Raises:
        ConversionError: something disagrees. The receipt is written then as well and says the same.
    """
    checkpoint = CheckpointReader(folder)
    tokenizer = Tokenizer(checkpoint.tokenizer_path)  # not SentencePiece itself where training uses a faster engine
    found = [SafetensorsFile(path) for path in sorted(folder.glob("*.safetensors"))]
    shapes = {name: shape for file in found for name, shape in file.shapes.items()}
    rows = [(name, shapes.get(name, (0,))[0]) for name in ROW_TENSORS]
    layout = check_layout(shapes_of(source.model), shapes, rows, tokenizer.vocabulary)
    checks = [layout, _check_config(source, checkpoint), _check_tokenizer(source, tokenizer)]
    tensors: dict[str, Hashes] = {}
    if not layout.disagreements:
        values = Check("values", [])

        def look(name: str) -> bool:
            tensors[name], is_finite = _look(source, checkpoint, name, values)
            return is_finite

        old_rows = source.old_rows if isinstance(source, Grown) else tokenizer.vocabulary
        tokens = windows(checkpoint.model, tokenizer, texts, old_rows)
        ours = MegacodeForward(checkpoint, checkpoint.dtype)
        checks += [values, *compare(ours, reference, checkpoint.model, tokens, old_rows, look, progress)]
    direction = f"from-{'hf' if source.kind == 'HuggingFace' else 'meta'}"
    return finish(
        folder,
        direction,
        checks,
        tensors,
        step=0,
        dtype=dtype_name(checkpoint.dtype),
        origins=source.origins,
        warnings=warnings_of(source),
        known={name: entry["sha256"] for name, entry in checkpoint.manifest["files"].items()},
    )


def _check_config(source: Source, checkpoint: CheckpointReader) -> Check:
    """What was written is what is read of the source."""
    wanted, written = source.model.model_dump(), checkpoint.model.model_dump()
    differences = [
        f"{key} is {written[key]} and should be {wanted[key]}" for key in wanted if written[key] != wanted[key]
    ]
    if checkpoint.dtype != source.dtype:
        differences.append(f"dtype is {dtype_name(checkpoint.dtype)} and should be {dtype_name(source.dtype)}")
    return Check("config", differences, {key: wanted[key] for key in ("rope_theta", "max_positions", "norm_epsilon")})


def _check_tokenizer(source: Source, tokenizer: Tokenizer) -> Check:
    """Random texts come back with SentencePiece's ids; a HuggingFace source's own tokenizer.json has the same rows."""
    fault = find_fault(tokenizer, NUM_FUZZED)
    differences = [] if fault is None else [fault]
    if source.kind == "HuggingFace":
        differences += _other_rows(tokenizer_rows(source.folder), tokenizer)
    return Check("tokenizer", differences, {"fuzzed_texts": NUM_FUZZED, "infilling": tokenizer.has_infilling})


def _other_rows(names: dict[int, str], tokenizer: Tokenizer) -> list[str]:
    swapped = [
        row for row in range(tokenizer.vocabulary) if names.get(row, tokenizer.piece(row)) != tokenizer.piece(row)
    ]
    if not swapped:
        return []
    row = swapped[0]
    return [
        f"{len(swapped)} rows have another piece than in the source's tokenizer.json, first row {row}: "
        f"{tokenizer.piece(row)!r} and there {names[row]!r}"
    ]


def _look(source: Source, checkpoint: CheckpointReader, name: str, values: Check) -> tuple[Hashes, bool]:
    """Compare a parameter: what is written, arranged and cut as in the source, has the hashes of its tensors.

    Also whether what is written is finite.

    These are read by their format's library, since what the conversion reads wrongly it would read so again.
    """
    pieces = [read_by_library(path, theirs) for path, theirs in source.places(name)]
    written = checkpoint.read_stored(name)
    hashes = Hashes([sha256(piece) for piece in pieces], sha256(written))
    parts = source.split(name, written)
    same = len(parts) == 1 and parts[0] is written  # arranged as in the source: not hashed twice
    if ([hashes.written] if same else [sha256(part) for part in parts]) != hashes.source:
        values.disagreements.append(f"{name} holds other values")
    elif isinstance(source, Grown) and name in ROW_TENSORS and not torch.equal(source.join(name, pieces), written):
        values.disagreements.append(f"the new rows of {name} are others")
    return hashes, finite(written)
