"""From a megacode checkpoint to a folder that `transformers` and everything around it loads.

Parameters stream through one at a time. Names and weights are HuggingFace's already, with half-split rotary pairs, so
nothing is permuted and nothing renamed.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megacode.checkpoint.hf_tokenizer import write_tokenizer
from megacode.checkpoint.reader import CheckpointReader
from megacode.checkpoint.tensorfile import TensorFile
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError
from megacode.recipe import ModelSection

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RECEIPT = "conversion_receipt.json"
"""Name of the file that marks a folder as an export of megacode."""

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


def export(
    checkpoint: CheckpointReader,
    folder: Path,
    dtype: str,
    *,
    check: Callable[[Path], None],
    force: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write `folder`: safetensors, config.json, generation_config.json and the tokenizer.

    Everything is written into a folder beside it and renamed when `check` has passed, so that a folder of this name is
    always whole and verified.

    Args:
        checkpoint: what to export.
        folder: the target; missing, or empty, or with `force` an earlier export.
        dtype: "bf16" or "fp32".
        check: called with the written folder before it gets its name; what it raises leaves the folder under its
            temporary name.
        force: replace an earlier export.
        max_shard_bytes: largest safetensors file, unless one parameter alone is larger.
        progress: called with bytes written and bytes to write.

    Raises:
        UserError: the target is taken, or the disk too small.
    """
    folder = folder.resolve()
    _check_target(folder, force)
    written = temporary_folder(folder)
    if written.exists():  # left by an export that was killed or disagreed
        shutil.rmtree(written)
    _check_space(checkpoint, written.parent, dtype)
    written.mkdir(parents=True)
    write_tokenizer(checkpoint.tokenizer_path, written, checkpoint.model.max_positions)
    tokenizer = Tokenizer(checkpoint.tokenizer_path)
    special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": None}
    _write_json(written / "config.json", {**config_of(checkpoint.model, dtype), **special})
    _write_json(written / "generation_config.json", special)
    _write_weights(checkpoint, written, DTYPES[dtype], max_shard_bytes, progress)
    check(written)
    _replace(written, folder)


def temporary_folder(folder: Path) -> Path:
    """Where an export stands until it is checked."""
    return folder.with_name(f".{folder.name}.export")


def config_of(model: ModelSection, dtype: str) -> dict[str, Any]:
    """config.json of a model, without the ids of its special tokens.

    What transformers renamed in version 5 stands under both names: `rope_theta` and `rope_scaling` inside
    `rope_parameters`, `torch_dtype` as `dtype`.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "torch_dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }


def plan_shards(checkpoint: CheckpointReader, dtype: torch.dtype, max_shard_bytes: int) -> list[list[str]]:
    """Names of the parameters of each file: in the global order, a file is closed when the next would not fit."""
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name in checkpoint.names:
        size_bytes = math.prod(checkpoint.shape(name)) * dtype.itemsize
        if shards[-1] and filled_bytes + size_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += size_bytes
    return shards


def _write_weights(
    checkpoint: CheckpointReader, folder: Path, dtype: torch.dtype, max_shard_bytes: int, progress: Progress
) -> None:
    shards = plan_shards(checkpoint, dtype, max_shard_bytes)
    num_parameters = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    done_bytes, total_bytes = 0, num_parameters * dtype.itemsize
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with TensorFile(folder / file, {name: (dtype, checkpoint.shape(name)) for name in names}) as written:
            for name in names:
                tensor = checkpoint.read(name).to(dtype)
                written.write(name, tensor)
                done_bytes += tensor.nbytes
                progress(done_bytes, total_bytes)
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        metadata = {"total_parameters": num_parameters, "total_size": total_bytes}
        _write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": files})


def _check_target(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for the export")
    if not any(folder.iterdir()):
        return
    if not (folder / RECEIPT).is_file():
        raise UserError(f"{folder} is not empty and no export of megacode; name another folder")
    if not force:
        raise UserError(f"{folder} holds an earlier export; name another folder or replace it with --force")


def _check_space(checkpoint: CheckpointReader, parent: Path, dtype: str) -> None:
    while not parent.exists():
        parent = parent.parent
    needed_bytes = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names) * DTYPES[dtype].itemsize
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        gib = 2**30
        raise UserError(
            f"{parent} has {free_bytes / gib:.1f} GiB free and the export takes {needed_bytes / gib:.1f} GiB; "
            "make room or name a folder on another disk"
        )


def _replace(written: Path, folder: Path) -> None:
    """Give the written folder its name; an earlier export goes away only after the new one stands."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        os.replace(folder, old)
    os.replace(written, folder)
    if old.exists():
        shutil.rmtree(old)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
