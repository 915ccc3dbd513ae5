"""A HuggingFace folder of a Llama 2 or Code Llama model: safetensors, or the older pytorch_model*.bin."""

from pathlib import Path
from typing import Any

from torch import Tensor

from megacode.checkpoint.convert.source import model_of, read_settings, shapes_of
from megacode.checkpoint.convert.stored import Found, StoredFile, check_tensors, open_stored
from megacode.checkpoint.convert.weights import Progress
from megacode.errors import UserError
from megacode.recipe import ModelSection

CARRIED = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
"""What is kept for an export back to HuggingFace, where the source has it."""

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json and generation_config.json: an id, several, or null."""

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

    Args:
        folder: with config.json and the weights.
        rope_theta: instead of what config.json says.

    Raises:
        UserError: the folder holds no such model; names the key, the file or the tensor.
    """

    kind = "HuggingFace"

    def __init__(self, folder: Path, rope_theta: float | None = None) -> None:
        self.folder = folder
        path = folder / "config.json"
        self.model, self.origins = read_config(path, read_settings(path), rope_theta)
        self.warnings: list[str] = []
        self.carried = [folder / name for name in CARRIED if (folder / name).is_file()]
        self._check_settings()
        self._files: dict[str, StoredFile] = {}
        for file in map(open_stored, _files(folder)):
            for name in file.shapes:
                if name in self._files:
                    raise UserError(f"{name} is in {self._files[name].path} and in {file.path}; leave the right one")
                if not name.endswith("rotary_emb.inv_freq"):
                    self._files[name] = file
        found: Found = {name: (file.path, file.shapes[name], file.dtypes[name]) for name, file in self._files.items()}
        self.dtype = check_tensors(found, shapes_of(self.model))

    def _check_settings(self) -> None:
        """What an export or the receipt takes of the other files of settings."""
        assert self.model.vocabulary is not None
        for path in (path for path in self.carried if path.suffix == ".json"):
            wrong = wrong_ids(read_settings(path), self.model.vocabulary)
            if wrong:
                raise UserError(f"{path}: {wrong[0]}; put the id of a row there, or null")
        tokenizer_rows(self.folder)

    def verify(self, progress: Progress) -> None:
        """No checksums come with these files."""

    def pieces(self, name: str) -> list[Tensor]:
        return [self._files[name].read(name)]

    def places(self, name: str) -> list[tuple[Path, str]]:
        return [(self._files[name].path, name)]

    def join(self, name: str, pieces: list[Tensor]) -> Tensor:
        return pieces[0]

    def split(self, name: str, whole: Tensor) -> list[Tensor]:
        return [whole]


def wrong_ids(settings: dict[str, Any], rows: int) -> list[str]:
    """What is wrong with the ids of special tokens in a file of settings: each must be one of so many rows."""
    wrong = []
    for key in SPECIAL_IDS:
        value = settings.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(each, int) and 0 <= each < rows for each in ids):
            wrong.append(f"{key} is {value!r} and the vocabulary has the rows 0 to {rows - 1}")
    return wrong


def tokenizer_rows(folder: Path) -> dict[int, str]:
    """Row -> piece of the folder's tokenizer.json; nothing where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    content = read_settings(path)
    try:
        rows = {int(row): piece for piece, row in content["model"]["vocab"].items()}
        return rows | {int(added["id"]): added["content"] for added in content.get("added_tokens") or []}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged, or of no BPE tokenizer; fetch it again, or remove it") from None


def read_config(
    path: Path, config: dict[str, Any], rope_theta: float | None = None
) -> tuple[ModelSection, dict[str, str]]:
    """The shape that a config.json describes, and where what is often guessed came from.

    What the file leaves out has the value of transformers' LlamaConfig, as transformers itself takes it.

    Args:
        path, config: the file and what it holds.
        rope_theta: as of `HfSource`.

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
    if rope_theta is not None:
        theta, theta_origin = rope_theta, f"the option --rope-theta, instead of {theta} ({theta_origin})"
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
    """Before version 5 of transformers at the top, since then in `rope_parameters`.

    An older key that stands beside a newer one counts as well: transformers lets `rope_scaling` win.
    """
    thetas = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        rotary = config.get(key) or {}
        if not (
            isinstance(rotary, dict)
            and all(rotary.get(name) in (None, "default") for name in ("rope_type", "type"))
            and rotary.get("partial_rotary_factor") in (None, 1.0)
        ):
            raise UserError(f"{path}: {key} is {rotary}; megacode has plain rotary positions alone, without scaling")
        thetas[key] = rotary.get("rope_theta")
    given = {key: theta for key, theta in thetas.items() if theta is not None}
    if not given:
        return 10000.0, "transformers' default, no rope_theta in config.json"
    key, theta = next(iter(given.items()))
    if any(other != theta for other in given.values()):
        said = " and ".join(f"{value} ({name})" for name, value in given.items())
        raise UserError(f"{path}: the rotary base is {said}; leave the right one")
    return theta, f"{key} in config.json"


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
