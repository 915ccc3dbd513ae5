"""Inputs of `megacode prepare`, and tokenizers that are trained in no time."""

import inspect
import textwrap
from pathlib import Path

from megacode.data.tokenizer import train


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Write files by their names below a folder, and return the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def small_model(path: Path, num_pieces: int = 400) -> Path:
    """Train a tokenizer on one module, and return its file."""
    train([inspect.getsource(textwrap)] * 3, path, num_pieces)
    return path
