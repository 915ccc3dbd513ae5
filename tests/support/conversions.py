"""The same nano model as HuggingFace's folder and as Meta's, with GQA, for conversions."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megacode.data.tokenizer import Tokenizer
from megacode.model.llama import Llama, initialise
from megacode.recipe import ModelSection

SHAPE = {"layers": 2, "hidden": 64, "heads": 16, "kv_heads": 8, "ffn": 192, "init_std": 0.1, "norm_epsilon": 1e-5}


def shape(tokenizer: Path, **fields: Any) -> ModelSection:
    """A small Code Llama of the tokenizer's rows, with GQA that 8 ranks can share."""
    values = {**SHAPE, "rope_theta": 1e6, "max_positions": 16384, "vocabulary": Tokenizer(tokenizer).vocabulary}
    return ModelSection.model_validate({**values, **fields})


def weights(model: ModelSection, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights, large enough that every part of it shows in the logits; norms that are not all ones."""
    named = {name: tensor.detach() for name, tensor in initialise(Llama(model), seed=3).named_parameters()}
    generator = torch.Generator().manual_seed(4)
    for name, tensor in named.items():
        if tensor.dim() == 1:
            named[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in named.items()}


def write_hf(
    folder: Path,
    model: ModelSection,
    tensors: dict[str, Tensor],
    tokenizer: Path,
    *,
    num_files: int = 1,
    suffix: str = "safetensors",
    config: dict[str, Any] | None = None,
) -> Path:
    """A HuggingFace folder: config.json as released ones have it, weights in so many files."""
    folder.mkdir(parents=True)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    values = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": model.vocabulary, "hidden_size": model.hidden, "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers, "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": model.max_positions, "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta, "rope_scaling": None, "tie_word_embeddings": False, "initializer_range": 0.02,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**values, **(config or {})}))
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = list(tensors)
    files = [f"{stem}-{i + 1:05d}-of-{num_files:05d}.{suffix}" for i in range(num_files)]
    files = files if num_files > 1 else [f"{stem}.{suffix}"]
    weight_map = {}
    for number, file in enumerate(files):
        content = {name: tensors[name].contiguous() for name in names[number::num_files]}
        weight_map |= dict.fromkeys(content, file)
        save_file(content, folder / file, {"format": "pt"}) if suffix == "safetensors" else torch.save(
            content, folder / file
        )
    if num_files > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_meta(
    folder: Path,
    model: ModelSection,
    tensors: dict[str, Tensor],
    tokenizer: Path,
    num_files: int,
    params: dict[str, Any] | None = None,
) -> Path:
    """Meta's folder of the same model, written from what is published of it and not with what converts.

    Row 2i of a head is HuggingFace's row i, and row 2i + 1 its row i + head_dim / 2.
    """
    folder.mkdir(parents=True)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    values = {
        "dim": model.hidden, "n_layers": model.layers, "n_heads": model.heads, "n_kv_heads": model.kv_heads,
        "multiple_of": 64, "ffn_dim_multiplier": 1.0, "norm_eps": model.norm_epsilon, "rope_theta": model.rope_theta,
    }  # fmt: skip
    given = {**values, **(params or {})}
    (folder / "params.json").write_text(json.dumps({key: value for key, value in given.items() if value is not None}))
    half = model.head_dim // 2
    order = [row for i in range(half) for row in (i, i + half)]
    for number in range(num_files):
        content = {"rope.freqs": torch.ones(half)}
        for name, tensor in tensors.items():
            if "q_proj" in name or "k_proj" in name:
                tensor = torch.cat([head[order] for head in tensor.split(model.head_dim)])
            theirs, dim = _meta(name)
            content[theirs] = tensor.clone() if dim is None else tensor.chunk(num_files, dim)[number].clone()
        torch.save(content, folder / f"consolidated.{number:02d}.pth")
    return folder


def write_checklist(folder: Path) -> Path:
    """Meta's checklist.chk of such a folder, by md5sum itself."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "checklist.chk")
    done = subprocess.run(["md5sum", *names], cwd=folder, check=True, capture_output=True)
    (folder / "checklist.chk").write_bytes(done.stdout)
    return folder / "checklist.chk"


def _meta(name: str) -> tuple[str, int | None]:
    words = {
        "q_proj": ("attention.wq", 0), "k_proj": ("attention.wk", 0), "v_proj": ("attention.wv", 0),
        "o_proj": ("attention.wo", 1), "gate_proj": ("feed_forward.w1", 0), "up_proj": ("feed_forward.w3", 0),
        "down_proj": ("feed_forward.w2", 1), "input_layernorm": ("attention_norm", None),
        "post_attention_layernorm": ("ffn_norm", None), "embed_tokens": ("tok_embeddings", 1), "norm": ("norm", None),
        "lm_head": ("output", 0),
    }  # fmt: skip
    parts = name.split(".")
    theirs, dim = words[parts[-2]]
    return f"{f'layers.{parts[2]}.' if 'layers' in parts else ''}{theirs}.weight", dim


def base_tokenizer(tokenizer: Path, path: Path) -> Path:
    """The tokenizer without its sixteen appended rows, as Llama 2's is."""
    proto = Tokenizer(tokenizer).model
    del proto.pieces[-16:]
    proto.trainer_spec.vocab_size = len(proto.pieces)
    path.write_bytes(proto.SerializeToString())
    return path
