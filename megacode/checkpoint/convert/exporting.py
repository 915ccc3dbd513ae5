"""From a megacode checkpoint to a folder that `transformers` and everything around it loads.

Parameters stream through one at a time. Names and weights are HuggingFace's already, with half-split rotary pairs, so
nothing is permuted and nothing renamed.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from megacode.checkpoint.convert.folder import CARRIED, write_json, written_beside
from megacode.checkpoint.convert.hf_source import SPECIAL_IDS
from megacode.checkpoint.convert.hf_tokenizer import write_tokenizer
from megacode.checkpoint.convert.stored import dtype_name
from megacode.checkpoint.convert.weights import MAX_FILE_BYTES, Progress, num_bytes, write_weights
from megacode.checkpoint.reader import DTYPES, CheckpointReader
from megacode.data.tokenizer import Tokenizer
from megacode.recipe import ModelSection

INDEX = "model.safetensors.index.json"


def default_dtype(checkpoint: CheckpointReader) -> str:
    """Converted weights keep their type, those of a run have the precision of its arithmetic."""
    stored = dtype_name(checkpoint.dtype)
    return checkpoint.precision if stored == "fp32" else stored


def export(
    checkpoint: CheckpointReader,
    folder: Path,
    dtype: str,
    *,
    check: Callable[[Path], None],
    force: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write `folder`: safetensors, config.json, generation_config.json and the tokenizer.

    Everything is written into a folder beside it and renamed when `check` has passed, so that a folder of this name is
    always whole and verified. Where the checkpoint was converted from HuggingFace, its generation_config.json, chat
    template and ids of special tokens are the source's.

    Args:
        checkpoint: what to export.
        folder: the target; missing, or empty, or with `force` an earlier conversion.
        dtype: "bf16", "fp16" or "fp32".
        check: called with the written folder before it gets its name; what it raises leaves the folder under its
            temporary name.
        force: replace an earlier conversion.
        max_file_bytes: largest safetensors file, unless one parameter alone is larger.
        progress: called with bytes written and bytes to write.

    Raises:
        UserError: the target is taken, or lies in the source or around it, or the disk too small or not writable.
    """
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names}
    needed_bytes = num_bytes(shapes, DTYPES[dtype])

    def read(name: str) -> Tensor:
        return checkpoint.read_stored(name).to(DTYPES[dtype])

    with written_beside(
        folder, source=checkpoint.folder, force=force, needed_bytes=needed_bytes, check=check
    ) as written:
        files = write_weights(
            written, shapes, DTYPES[dtype], read, _file_name, max_file_bytes=max_file_bytes, progress=progress
        )
        if len(files) > 1:
            metadata = {"total_parameters": needed_bytes // DTYPES[dtype].itemsize, "total_size": needed_bytes}
            weight_map = {name: file.name for file in files for name in file.tensors}
            write_json(written / INDEX, {"metadata": metadata, "weight_map": weight_map})
        write_tokenizer(checkpoint.tokenizer_path, written, checkpoint.model.max_positions)
        _write_configs(checkpoint, written, dtype)


def _file_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def _write_configs(checkpoint: CheckpointReader, folder: Path, dtype: str) -> None:
    """config.json, generation_config.json and the chat template."""
    carried = checkpoint.folder / CARRIED
    write_json(folder / "generation_config.json", _own_ids(checkpoint))
    for name in ("generation_config.json", "chat_template.jinja"):
        if (carried / name).is_file():
            shutil.copyfile(carried / name, folder / name)
    write_json(folder / "config.json", {**config_of(checkpoint.model, dtype), **special_ids(checkpoint)})
    template = _read(carried / "tokenizer_config.json").get("chat_template")
    if template is not None:
        path = folder / "tokenizer_config.json"
        write_json(path, {**_read(path), "chat_template": template})


def special_ids(checkpoint: CheckpointReader) -> dict[str, Any]:
    """Ids of special tokens in config.json: the source's, where the checkpoint was converted, else the tokenizer's."""
    config = _read(checkpoint.folder / CARRIED / "config.json")
    return {key: config.get(key, own) for key, own in _own_ids(checkpoint).items()}


def _own_ids(checkpoint: CheckpointReader) -> dict[str, Any]:
    tokenizer = Tokenizer(checkpoint.tokenizer_path)
    return dict(zip(SPECIAL_IDS, (tokenizer.bos, tokenizer.eos, None), strict=True))


def _read(path: Path) -> dict[str, Any]:
    """The JSON of a file; nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def config_of(model: ModelSection, dtype: str) -> dict[str, Any]:
    """config.json of a model, without the ids of its special tokens.

    What transformers renamed in version 5 stands under both names: `rope_theta` and `rope_scaling` inside
    `rope_parameters`, `torch_dtype` as `dtype`.
    """
    stored = str(DTYPES[dtype]).removeprefix("torch.")
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
        "dtype": stored,
        "torch_dtype": stored,
    }
