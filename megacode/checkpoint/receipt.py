"""The receipt of an export: `transformers` loads the folder and must compute what megacode computes.

Wrong conversions load without a word and talk nonsense: interleaved instead of half-split rotary pairs, gate and up
swapped, another epsilon or theta, padded vocabulary rows, other token ids. Each check here is for some of these.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megacode
from megacode.checkpoint.hf import DTYPES, RECEIPT, Progress, config_of
from megacode.checkpoint.hf_tokenizer import FUZZ, compare_tokenizer, fuzzed_texts
from megacode.checkpoint.reader import CheckpointReader
from megacode.data.tokenizer import Tokenizer
from megacode.model.llama import Block, Llama
from megacode.recipe import ModelSection

LOGIT_TOLERANCE = 1e-4
"""Largest difference of logits over their largest magnitude (or over 1, if that is less). Both sides compute in fp32
from the same weights, so only the order of sums differs, which leaves 1e-6; wrong conversions leave 1e-3 and more."""

ROTARY_TOLERANCE = 1e-3
"""Largest difference of attention scores over their largest magnitude. At position 2047 one unit in the last place of a
frequency turns a pair by 1e-4; other pairs or another theta change scores by their own size."""

NUM_FUZZED = 2000
WINDOW_TOKENS = 128
MAX_WINDOWS = 8
"""Windows of text: with these a 7B model takes minutes on a CPU."""
NUM_PROBED_POSITIONS = 16
MAX_PROBED_POSITION = 2047
SEED = 0


class ConversionError(RuntimeError):
    """The exported folder disagrees with the checkpoint; the message says in what."""


@dataclass(frozen=True)
class Check:
    """One check: what it measured, and what disagreed (empty: nothing)."""

    name: str
    disagreements: list[str]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Receipt:
    """What conversion_receipt.json holds."""

    agrees: bool
    step: int
    dtype: str
    checks: list[Check]
    versions: dict[str, str]
    sha256: dict[str, str]
    """Of every file of the folder but the receipt."""


@dataclass(frozen=True)
class _Outputs:
    """What one side computed in fp32."""

    logits: list[Tensor]
    """One [1, sequence, vocabulary] per window."""
    scores: list[Tensor]
    """One [1, heads, probed positions, probed positions] per layer: q after rotation times k after rotation."""


def check_export(
    checkpoint: CheckpointReader, folder: Path, texts: list[str], progress: Progress = lambda done, total: None
) -> Receipt:
    """Compare an exported folder with its checkpoint and write conversion_receipt.json into it.

    Host memory holds the whole model in fp32 once: `transformers` loads it so. megacode's side is computed block by
    block after that.

    Args:
        checkpoint: where the export came from.
        folder: the export.
        texts: code to compare tokens and logits on.
        progress: called with steps done and steps to do.

    Raises:
        ConversionError: something disagrees. The receipt is written then as well and says the same.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = "bf16" if config["dtype"] == "bfloat16" else "fp32"
    tokenizer = Tokenizer(checkpoint.tokenizer_path, oracle=True)
    num_steps = checkpoint.model.layers + 2
    layout = _check_layout(checkpoint, folder, config, tokenizer)
    checks = [layout, _check_config(checkpoint.model, config, dtype), _check_tokenizer(tokenizer, folder, texts)]
    progress(1, num_steps)
    if not layout.disagreements:  # else transformers would not load the folder, or make up what it misses
        checks.append(_check_values(checkpoint, folder, DTYPES[dtype]))
        windows = _windows(checkpoint.model, tokenizer, texts)
        theirs = _transformers_outputs(folder, checkpoint.model, windows)
        progress(2, num_steps)
        ours = _megacode_outputs(checkpoint, DTYPES[dtype], windows, lambda layer: progress(layer + 3, num_steps))
        checks += [_check_logits(ours, theirs), _check_rotary(ours, theirs)]
    disagreements = [f"{check.name}: {found}" for check in checks for found in check.disagreements]
    receipt = Receipt(not disagreements, checkpoint.step, dtype, checks, _versions(), _hashes(folder))
    (folder / RECEIPT).write_text(json.dumps(asdict(receipt), indent=2) + "\n", encoding="utf-8")
    if disagreements:
        raise ConversionError(f"{folder} disagrees with the checkpoint: {'; '.join(disagreements)}")
    return receipt


def _check_layout(checkpoint: CheckpointReader, folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> Check:
    """Names, shapes and number of parameters; as many rows as the tokenizer has, without padding."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118 (no dict)
    expected = {name: tuple(checkpoint.shape(name)) for name in checkpoint.names}
    differences = [f"{name} is missing" for name in expected if name not in shapes]
    differences += [f"{name} is not of the model" for name in shapes if name not in expected]
    differences += [
        f"{name} is {list(shapes[name])} and should be {list(shape)}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    rows = {
        "the embedding": shapes.get("model.embed_tokens.weight", (0,))[0],
        "the head": shapes.get("lm_head.weight", (0,))[0],
        "config.json": config["vocab_size"],
    }
    differences += [
        f"{where} has {count} rows and the tokenizer {tokenizer.vocabulary}"
        for where, count in rows.items()
        if count != tokenizer.vocabulary
    ]
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    return Check("layout", differences, {"num_parameters": num_parameters, "vocabulary_rows": tokenizer.vocabulary})


def _check_config(model: ModelSection, config: dict[str, Any], dtype: str) -> Check:
    expected = config_of(model, dtype)
    differences = [
        f"{key} is {config.get(key)} in config.json and should be {value}"
        for key, value in expected.items()
        if config.get(key) != value
    ]
    return Check("config", differences)


def _check_tokenizer(tokenizer: Tokenizer, folder: Path, texts: list[str]) -> Check:
    differences = compare_tokenizer(tokenizer, folder, [*texts, *fuzzed_texts(NUM_FUZZED, SEED)])
    return Check("tokenizer", differences, {"texts": len(texts), "fuzzed_texts": NUM_FUZZED, "kinds": list(FUZZ)})


def _check_values(checkpoint: CheckpointReader, folder: Path, dtype: torch.dtype) -> Check:
    """Every value, bit by bit."""
    from safetensors import safe_open

    differences = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (no dict)
                tensor = stored.get_tensor(name)
                if tensor.dtype != dtype or not torch.equal(tensor, checkpoint.read(name).to(dtype)):
                    differences.append(f"{name} holds other values")
    return Check("values", differences)


def _windows(model: ModelSection, tokenizer: Tokenizer, texts: list[str]) -> list[Tensor]:
    """Token ids [1, sequence] to compare logits on: of the texts, and random ones that reach every kind of row."""
    length = min(WINDOW_TOKENS, model.max_positions)
    documents = ([tokenizer.bos, *tokenizer.encode(text)] for text in texts)
    cuts = (ids[start : start + length] for ids in documents for start in range(0, len(ids), length))
    windows = [torch.tensor([ids]) for ids in islice(cuts, MAX_WINDOWS)]
    generator = torch.Generator().manual_seed(SEED)
    return [*windows, torch.randint(tokenizer.vocabulary, (1, length), generator=generator)]


def _probe(model: ModelSection) -> tuple[Tensor, Tensor]:
    """Random hidden states [1, probed, hidden] of unit size, and the positions [1, probed] that they stand at."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(1, NUM_PROBED_POSITIONS, model.hidden, generator=generator)
    last = min(MAX_PROBED_POSITION, model.max_positions - 1)
    return x, torch.linspace(0, last, NUM_PROBED_POSITIONS).long()[None]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q [1, sequence, heads, head_dim], k [1, sequence, kv_heads, head_dim] -> [1, heads, sequence, sequence]"""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return torch.einsum("bqhd,bkhd->bhqk", q, k)


@torch.inference_mode()
def _transformers_outputs(folder: Path, config: ModelSection, windows: list[Tensor]) -> _Outputs:
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    x, positions = _probe(config)
    cos, sin = model.model.rotary_emb(x, positions)
    scores = []
    for layer in model.model.layers:
        attention = layer.self_attn
        q, k = (proj(x).unflatten(-1, (-1, config.head_dim)) for proj in (attention.q_proj, attention.k_proj))
        scores.append(_scores(*apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)))
    return _Outputs([model(window).logits for window in windows], scores)


@torch.inference_mode()
def _megacode_outputs(
    checkpoint: CheckpointReader, dtype: torch.dtype, windows: list[Tensor], progress: Callable[[int], None]
) -> _Outputs:
    """The same of megacode, one block in memory at a time, from weights rounded to `dtype`."""
    config = checkpoint.model
    x, probed_positions = _probe(config)
    states, scores = windows, []
    for number in range(config.layers):
        chunk = Llama(config, blocks=[number], first=number == 0, last=number == config.layers - 1)
        for name, parameter in chunk.named_parameters():
            parameter.copy_(checkpoint.read(name).to(dtype))
        block = chunk.model.layers[str(number)]
        assert isinstance(block, Block)
        attention = block.self_attn
        q, k = attention.q_proj(x), attention.k_proj(x)
        rotated = attention.layers.rope(q, k, probed_positions, config.rope_theta, config.head_dim)
        scores.append(_scores(*rotated))
        states = [chunk(state, torch.arange(state.shape[1])[None]) for state in states]
        progress(number)
    return _Outputs(states, scores)


def _check_logits(ours: _Outputs, theirs: _Outputs) -> Check:
    pairs = list(zip(ours.logits, theirs.logits, strict=True))
    difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()  # torch's max keeps a NaN
    magnitude = torch.stack([a.abs().max() for a, _ in pairs]).max().item()
    tolerance = LOGIT_TOLERANCE * max(1.0, magnitude)
    figures = {
        "largest_difference": difference,
        "tolerance": tolerance,
        "largest_logit": magnitude,
        "num_tokens": sum(logits.shape[1] for logits in ours.logits),
    }
    agrees = difference <= tolerance
    return Check("logits", [] if agrees else [f"they differ by {difference:.3g}, more than {tolerance:.3g}"], figures)


def _check_rotary(ours: _Outputs, theirs: _Outputs) -> Check:
    """Scores of queries and keys at far apart positions, for each layer over its largest score."""
    pairs = list(zip(ours.scores, theirs.scores, strict=True))
    differences = [((a - b).abs().max() / a.abs().max()).item() for a, b in pairs]
    wrong = [layer for layer, difference in enumerate(differences) if not difference <= ROTARY_TOLERANCE]
    found = f"attention scores differ in layers {wrong}: q or k rows, rotary pairs or theta are others"
    figures = {"largest_relative_difference": max(differences), "tolerance": ROTARY_TOLERANCE}
    return Check("rotary", [found] if wrong else [], figures)


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers", "safetensors", "sentencepiece")
    return {"megacode": megacode.__version__, **{package: version(package) for package in packages}}


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.name != RECEIPT:
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
