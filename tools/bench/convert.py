"""What converting costs: the kernel's count of peak memory, and MB/s beside those of `dd` on the same disk.

Makes a checkpoint of a preset's shape out of random bf16 numbers, a tensor at a time, converts it by `megacode convert`
in processes of their own, and deletes each folder as soon as the next no longer needs it. Files are dropped from the
page cache before they are read.

    python -m megacode.tools.bench.convert --model code-llama-7b --folder /tmp/big
"""

import importlib.metadata
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megacode.errors import UserError
from megacode.model.presets import PRESETS

if TYPE_CHECKING:
    from torch import Tensor

    from megacode.recipe import ModelSection

MEGACODE = "from megacode.cli import main; main()"
"""The command `megacode`, of this very checkout."""
POOL = 1 << 24
"""Random numbers that all tensors are made of, each from another start on."""
NEEDED = {"from-hf": "source", "to-hf": "own", "from-meta": "meta"}
"""Direction -> folder that it reads."""
META_FILES = {4096: 1, 5120: 2, 8192: 8}
"""Hidden width -> model-parallel files, as Meta's releases have them."""


def main(
    model: Annotated[str, typer.Option(help="A preset.")] = "code-llama-7b",
    folder: Annotated[Path, typer.Option(help="Where big files may lie; made, and removed.")] = Path("bench-convert"),
    directions: Annotated[str, typer.Option(help="Which, by commas, in this order.")] = "from-hf,to-hf,from-meta",
    layers: Annotated[int | None, typer.Option(help="So many instead of the preset's: memory does not depend.")] = None,
) -> None:
    """Print a line of JSON for the copy by dd, and one for each direction."""
    chosen = directions.split(",")
    misplaced = any(
        each == "to-hf" and former != "from-hf" for former, each in zip(["", *chosen], chosen, strict=False)
    )
    if not set(chosen) <= NEEDED.keys() or misplaced:
        raise UserError(f"--directions {directions}: known are from-hf, to-hf (right after from-hf) and from-meta")
    if model not in PRESETS:
        raise UserError(f"--model {model} is unknown; known are {', '.join(PRESETS)}")
    if folder.exists():
        raise UserError(f"{folder} exists; name a folder that may be made and removed")
    folder.mkdir(parents=True)
    try:
        _say(
            {"versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")}}
        )
        for number, direction in enumerate(chosen):
            source, target = folder / NEEDED[direction], folder / ("own" if direction != "to-hf" else "back")
            if not source.exists():
                _alone(_make, model, layers, source, direction == "from-meta")
            if number == 0:
                _say(_copy(source, folder / "copy"))
            _say(_measure(direction, source, target))
            shutil.rmtree(source)
            if chosen[number + 1 : number + 2] != ["to-hf"]:
                shutil.rmtree(target)
    finally:
        shutil.rmtree(folder)


def _say(figures: dict[str, Any]) -> None:
    print(json.dumps(figures), flush=True)


def _measure(direction: str, source: Path, target: Path) -> dict[str, Any]:
    """One conversion in a process of its own."""
    size = _drop_from_cache(source)
    started = time.perf_counter()
    command = [sys.executable, "-c", MEGACODE, "convert", direction, str(source), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}: {output}")
    found = re.search(r"writing ([\d.]+) s, comparing ([\d.]+) s", output)
    assert found is not None, output
    writing, comparing = (float(figure) for figure in found.groups())
    return {
        "direction": direction,
        "source_bytes": size,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "writing_seconds": writing,
        "mb_per_second": size / writing / 1e6,
        "comparing_seconds": comparing,
        "seconds": time.perf_counter() - started,
    }


def _copy(source: Path, target: Path) -> dict[str, Any]:
    """The first 4 GiB or so of the source's largest file by dd, onto the disk."""
    file = max(source.iterdir(), key=lambda path: path.stat().st_size)
    _drop_from_cache(source)
    started = time.perf_counter()
    command = ["dd", f"if={file}", f"of={target}", "bs=8M", "count=512", "conv=fsync", "status=none"]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    size = target.stat().st_size
    target.unlink()
    return {"direction": "dd", "bytes": size, "seconds": seconds, "mb_per_second": size / seconds / 1e6}


def _drop_from_cache(folder: Path) -> int:
    """Have the kernel forget the files' pages; gives their size."""
    size = 0
    for path in folder.iterdir():
        if path.is_file():
            size += path.stat().st_size
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return size


def _alone(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of its own: a child's peak, as the kernel counts it, begins with its parent's."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__.strip('_')} ended with {process.exitcode}")


def _make(preset: str, layers: int | None, folder: Path, meta: bool) -> None:
    """A source of a preset's shape."""
    from megacode.checkpoint.convert.source import shapes_of
    from megacode.recipe import ModelSection

    folder.mkdir()
    rows = PRESETS[preset].get("vocabulary", 32016)
    model = ModelSection.model_validate(
        {"preset": preset, "vocabulary": rows, **({"layers": layers} if layers else {})}
    )
    assert model.vocabulary is not None
    _write_tokenizer(folder / "tokenizer.model", model.vocabulary)
    shapes, fill = shapes_of(model), _pool()
    _write_meta(folder, model, shapes, fill) if meta else _write_hf(folder, model, shapes, fill)


def _write_tokenizer(path: Path, rows: int) -> None:
    """A small trained one, filled up to `rows` with pieces that no text reaches."""
    import argparse
    import ast

    from sentencepiece import sentencepiece_model_pb2

    from megacode.data.tokenizer import NUM_APPENDED_ROWS, train, with_infilling

    train((Path(str(module.__file__)).read_text(encoding="utf-8") for module in (argparse, ast)), path, 500)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    del model.pieces[-NUM_APPENDED_ROWS:]
    lowest = model.pieces[-1].score
    for number in range(rows - NUM_APPENDED_ROWS - len(model.pieces)):
        piece = model.pieces.add()
        piece.piece, piece.score = f"\u25b6{number}\u25c0", lowest - 1 - number
    path.write_bytes(model.SerializeToString())
    path.write_bytes(with_infilling(path))


def _pool() -> "Callable[[str, Tensor], None]":
    """Fills a tensor, by its name, with bf16 numbers of deviation 0.02, norms around 1."""
    import torch

    numbers = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def fill(name: str, tensor: "Tensor") -> None:
        flat, start = tensor.view(-1), zlib.crc32(name.encode()) % POOL
        while len(flat):
            piece = numbers[start : start + len(flat)]
            flat[: len(piece)] = piece + 1 if tensor.dim() == 1 else piece
            flat, start = flat[len(piece) :], 0

    return fill


def _write_hf(
    folder: Path, model: "ModelSection", shapes: dict[str, tuple[int, ...]], fill: "Callable[[str, Tensor], None]"
) -> None:
    import torch

    from megacode.checkpoint.convert.exporting import INDEX, config_of
    from megacode.checkpoint.convert.weights import write_weights

    def read(name: str) -> "Tensor":
        tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
        fill(name, tensor)
        return tensor

    names = "model-{:05d}-of-{:05d}.safetensors"
    files = write_weights(folder, shapes, torch.bfloat16, read, lambda number, total: names.format(number + 1, total))
    weight_map = {name: file.name for file in files for name in file.tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_of(model, "bf16")))


def _write_meta(
    folder: Path, model: "ModelSection", shapes: dict[str, tuple[int, ...]], fill: "Callable[[str, Tensor], None]"
) -> None:
    """Meta's files: made with room for the numbers, which are then filled in through a mapping."""
    import mmap

    import torch

    from megacode.checkpoint.convert.meta_source import feed_forward_width, meta_name

    count = META_FILES.get(model.hidden, 1)
    for number in range(count):
        empty = {}
        for name, shape in shapes.items():
            theirs, dim = meta_name(name)
            share = [size // count if axis == dim else size for axis, size in enumerate(shape)]
            empty[theirs] = torch.empty(share, dtype=torch.bfloat16)
        path = folder / f"consolidated.{number:02d}.pth"
        with torch.serialization.skip_data():
            torch.save(empty, path)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            mapped = torch.load(path, mmap=True, weights_only=True)
        for name, tensor in mapped.items():
            fill(name if tensor.dim() == 1 else f"{name} {number}", tensor)
    rules = [(256, 1.0), (4096, 1.3), (16, 1.0)]
    multiple, multiplier = next(rule for rule in rules if feed_forward_width(model.hidden, *rule) == model.ffn)
    params = {
        "dim": model.hidden, "n_layers": model.layers, "n_heads": model.heads, "n_kv_heads": model.kv_heads,
        "multiple_of": multiple, "ffn_dim_multiplier": multiplier,
        "norm_eps": model.norm_epsilon, "rope_theta": model.rope_theta,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"error: {error}")
