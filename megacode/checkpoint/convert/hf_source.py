"""A HuggingFace folder of a Llama 2 or Code Llama model: safetensors, or the older pytorch_model*.bin."""

from pathlib import Path
from typing import Any

from torch import Tensor

from megacode.checkpoint.convert.source import model_of, read_settings, shapes_of
from megacode.checkpoint.convert.stored import Found, StoredFile, check_tensors, open_stored
from megacode.errors import UserError
from megacode.recipe import ModelSection

CARRIED = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
"""What is kept for an export back to HuggingFace, where the source has it."""

_REQUIRED = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocabulary": "vocab_size",
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}
"""Key of config.json -> the values that mean what megacode computes."""


class HfSource:
    """See `Source`.

    Raises:
        UserError: the folder holds no such model; names the key, the file or the tensor.
    """

    kind = "HuggingFace"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "config.json"
        self.model, self.origins = read_config(path, read_settings(path))
        self._files: dict[str, StoredFile] = {}
        for file in map(open_stored, _files(folder)):
            for name in file.shapes:
                if name in self._files:
                    raise UserError(f"{name} is in {self._files[name].path} and in {file.path}; leave the right one")
                if not name.endswith("rotary_emb.inv_freq"):
                    self._files[name] = file
        found: Found = {name: (file.path, file.shapes[name], file.dtypes[name]) for name, file in self._files.items()}
        self.dtype = check_tensors(found, shapes_of(self.model))
        self.carried = [folder / name for name in CARRIED if (folder / name).is_file()]

    def pieces(self, name: str) -> list[Tensor]:
        return [self._files[name].read(name)]

    def join(self, name: str, pieces: list[Tensor]) -> Tensor:
        return pieces[0]

    def split(self, name: str, whole: Tensor) -> list[Tensor]:
        return [whole]


def read_config(path: Path, config: dict[str, Any]) -> tuple[ModelSection, dict[str, str]]:
    """The shape that a config.json describes, and where what is often guessed came from.

    What the file leaves out has the value of transformers' LlamaConfig, as transformers itself takes it.

    Raises:
        UserError: another architecture, or a kind of Llama that megacode does not compute; names the key.
    """
    for key, allowed in _FIXED.items():
        if config.get(key) not in allowed:
            raise UserError(
                f"{path}: {key} is {config.get(key)!r} and not {allowed[0]!r}; name a folder of Llama 2 or Code Llama"
            )
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        raise UserError(f"{path}: architectures is {architectures}; megacode converts LlamaForCausalLM alone")
    lacking = [key for key in _REQUIRED.values() if key not in config]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}; take the file of the model's repository")
    theta, theta_origin = _rope_theta(path, config)
    origins = {"rope_theta": theta_origin}
    values: dict[str, Any] = {field: config[key] for field, key in _REQUIRED.items()}
    for field, key, default in (
        ("kv_heads", "num_key_value_heads", values["heads"]),
        ("max_positions", "max_position_embeddings", 2048),
        ("norm_epsilon", "rms_norm_eps", 1e-6),
        ("init_std", "initializer_range", 0.02),
    ):
        given = config.get(key)
        values[field] = default if given is None else given
        origins[field] = (
            f"{key} in config.json" if given is not None else f"transformers' default, no {key} in config.json"
        )
    model = model_of(path, rope_theta=theta, **values)
    if config.get("head_dim") not in (None, model.head_dim):
        raise UserError(
            f"{path}: head_dim is {config['head_dim']} and hidden_size / num_attention_heads {model.head_dim}"
        )
    return model, origins


def _rope_theta(path: Path, config: dict[str, Any]) -> tuple[float, str]:
    """Before version 5 of transformers at the top, since then in `rope_parameters`."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default" or scaling.get("partial_rotary_factor", 1.0) != 1.0:
        key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        raise UserError(f"{path}: {key} is {scaling}; megacode has plain rotary positions alone, without scaling")
    inside, outside = scaling.get("rope_theta"), config.get("rope_theta")
    if None not in (inside, outside) and inside != outside:
        raise UserError(f"{path}: rope_theta is {outside} and in rope_parameters {inside}; leave the right one")
    if inside is not None:
        return float(inside), "rope_parameters in config.json"
    if outside is not None:
        return float(outside), "rope_theta in config.json"
    return 10000.0, "transformers' default, no rope_theta in config.json"


def _files(folder: Path) -> list[Path]:
    """The files of weights; safetensors where there are both.

    Raises:
        UserError: there are none, or one that the index names is missing.
    """
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).is_file():
            weight_map = read_settings(folder / index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{folder / index} is damaged (no weight_map); fetch it again")
            names = sorted(set(weight_map.values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(
                    f"{folder} lacks {missing[0]}, one of the {len(names)} files that {index} names; fetch it"
                )
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    raise UserError(
        f"{folder} holds no weights (model.safetensors, pytorch_model.bin, or several with their .index.json); "
        f"name a HuggingFace folder of a model"
    )
