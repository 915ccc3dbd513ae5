"""A small checkpoint on disk, to export and to spoil."""

import argparse
import ast
import json.decoder
from pathlib import Path

from megacode.checkpoint.reader import CheckpointReader, Progress
from megacode.checkpoint.store import save, step_folder
from megacode.data.tokenizer import Tokenizer, train
from megacode.model.layers import part_of
from megacode.model.llama import Llama, initialise
from support.saving import ALONE, Held
from support.training import recipe


def train_tokenizer(path: Path, num_pieces: int = 600) -> Path:
    """A tokenizer of code that every Python has."""
    sources = (Path(module.__file__) for module in (argparse, ast, json.decoder))
    train((source.read_text(encoding="utf-8") for source in sources), path, num_pieces)
    return path


def write_checkpoint(run: Path, step: int = 7, seed: int = 0) -> CheckpointReader:
    """A nano model with random weights, large enough that every part of it shows in the logits."""
    tokenizer = run / "tokenizer.model"
    if not tokenizer.exists():
        train_tokenizer(tokenizer)
    model = {"preset": "nano", "hidden": 64, "ffn": 176, "layers": 2, "init_std": 0.1}
    config = recipe(
        run=str(run),
        precision="bf16",
        model={**model, "vocabulary": Tokenizer(tokenizer).vocabulary},
        tokenizer={"path": str(tokenizer)},
    )
    parameters = dict(initialise(Llama(config.model), seed).named_parameters())
    save(
        step_folder(run, step),
        config,
        Progress(step=step, next_sample=0, adam_step=step, seed=seed, sequence_length=12, num_tokens=0),
        {name: part_of(parameter) for name, parameter in parameters.items()},
        Held(parameters, lambda into, name, key: into.copy_(parameters[name].detach() * (key == "weight"))),
        ALONE,
    )
    return CheckpointReader(step_folder(run, step))
