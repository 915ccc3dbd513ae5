"""`megacode convert`: checkpoints from HuggingFace and Meta, and to HuggingFace."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megacode.errors import UserError
from megacode.tools.output import JsonFile, json_output

if TYPE_CHECKING:
    from megacode.checkpoint.convert.forward import Forward
    from megacode.checkpoint.convert.receipt import Receipt
    from megacode.checkpoint.convert.source import Source
    from megacode.checkpoint.convert.weights import Progress

    Bar = Callable[[str], Progress]
    """A bar of a name."""

app = typer.Typer(help="Convert checkpoints, in a stream and with a receipt.", no_args_is_help=True)

SNIPPETS = [
    'def mean(values: list[float]) -> float:\n    """The average."""\n    return sum(values) / len(values)\n',
    '#include <stdio.h>\r\n\r\nint main(void) {\r\n\tprintf("%d\\n", 0x7fffffff);\r\n\treturn 0;\r\n}\r\n',
    "  - name: größe\n    note: 漢字, кириллица, \U0001f600\n    pi: 3.14159265358979\n",
    "class Node:\n        def __init__(self, next=None):\n                self.next = next  # </s> is text here\n",
    "SELECT id, COUNT(*) FROM users WHERE age >= 18 GROUP BY id HAVING COUNT(*) > 1 ORDER BY 2 DESC;\n",
]
"""What the receipt compares on if no --text is given."""

Target = Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")]
TokenizerFile = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="FILE", help="The model's SentencePiece file, where not in SRC.")
]
AddInfilling = Annotated[
    bool, typer.Option("--add-infilling", help="Append the 16 rows of infilling pieces to tokenizer, embedding, head.")
]
NewRows = Annotated[
    Literal["mean", "normal"],
    typer.Option(help="What the appended rows are: the mean of the old ones, or drawn with their mean and deviation."),
]
Text = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Code to compare on, instead of a few snippets; repeatable."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier conversion in DST, if nothing else is there.")]


@app.command("from-hf")
def from_hf(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A HuggingFace folder of Llama 2 or Code Llama.")],
    target: Target,
    tokenizer: TokenizerFile = None,
    add_infilling: AddInfilling = False,
    new_rows: NewRows = "mean",
    rope_theta: Annotated[float | None, typer.Option(min=0, help="Where that of config.json is wrong.")] = None,
    text: Text = None,
    force: Force = False,
    json_file: JsonFile = None,
) -> None:
    """Convert a HuggingFace folder (safetensors or pytorch_model*.bin) for `checkpoint.start_from`.

    Weights keep their type (bf16, fp16, fp32), byte for byte. The receipt compares every byte, the tokenizer, and the
    logits of megacode with a separate plain forward of the source, layer by layer. DST gets its name only when all
    agree, and holds conversion_receipt.json then; else the command exits with 1 and names what disagrees.

    Example: megacode convert from-hf CodeLlama-7b-hf weights/7b
    """
    from megacode.checkpoint.convert.hf_source import HfSource
    from megacode.checkpoint.convert.reference import Reference

    opened = HfSource(source, rope_theta)
    reference = Reference.of_hf(source, rope_theta)
    _import(opened, reference, target, tokenizer, new_rows if add_infilling else None, text, force, json_file)


@app.command("from-meta")
def from_meta(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Meta's folder: params.json, consolidated.NN.pth.")],
    target: Target,
    tokenizer: TokenizerFile = None,
    add_infilling: AddInfilling = False,
    new_rows: NewRows = "mean",
    rope_theta: Annotated[
        float | None, typer.Option(min=0, help="Where params.json has none; left out, 10000 as in Meta's code.")
    ] = None,
    max_positions: Annotated[
        int | None, typer.Option(min=1, help="Context; left out, 16384 above a rope_theta of 10000, else 4096.")
    ] = None,
    text: Text = None,
    force: Force = False,
    json_file: JsonFile = None,
) -> None:
    """Convert Meta's own files, of 1, 2, 4 or 8 model-parallel ranks, for `checkpoint.start_from`.

    The rows of q and k are put into HuggingFace's order, nothing else changes. Where SRC has Meta's checklist.chk, the
    files must have the checksums in it: swapped ones look right otherwise. Receipt and DST as in from-hf.

    Example: megacode convert from-meta CodeLlama-34b weights/34b
    """
    from megacode.checkpoint.convert.meta_source import MetaSource
    from megacode.checkpoint.convert.reference import Reference

    opened = MetaSource(source, rope_theta, max_positions)
    reference = Reference.of_meta(source, rope_theta)
    _import(opened, reference, target, tokenizer, new_rows if add_infilling else None, text, force, json_file)


def _import(
    source: "Source",
    reference: "Forward",
    target: Path,
    tokenizer: Path | None,
    new_rows: Literal["mean", "normal"] | None,
    text: list[Path] | None,
    force: bool,
    json_file: Path | None,
) -> None:
    from megacode.checkpoint.convert import importing, importing_receipt
    from megacode.checkpoint.convert.source import warnings_of

    texts = _texts(text)
    for warning in warnings_of(source):
        typer.echo(f"warning: {warning}", err=True)
    source, pieces = importing.with_tokenizer(source, tokenizer, new_rows)

    def write(check: Callable[[Path], None], bar: "Bar") -> None:
        importing.convert(
            source, pieces, target, check=check, force=force, progress=bar("writing"), verifying=bar("checksums")
        )

    def compare(folder: Path, progress: "Progress") -> "Receipt":
        return importing_receipt.check_import(source, reference, folder, texts, progress)

    lines = importing.recipe_lines(source.model, target)
    _convert(write, compare, target, json_file, f"To train from it, these lines of a recipe:\n\n{lines}")


@app.command("to-hf")
def to_hf(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A step folder, or a run folder: its newest.")],
    target: Target,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="Type of the weights; left out, that of converted weights, or the precision of the run."),
    ] = None,
    text: Text = None,
    force: Force = False,
    json_file: JsonFile = None,
) -> None:
    """Export a checkpoint for transformers, and prove that it computes the same.

    The receipt compares config, every value, token ids, and the logits of megacode with those of transformers' own
    layers, in fp32 on the CPU, one weight in memory at a time. DST gets its name only when all agree, and holds
    conversion_receipt.json then; else the command exits with 1 and names what disagrees.

    Example: megacode convert to-hf runs/demo exports/demo
    """
    texts = _texts(text)

    from transformers.utils import logging

    from megacode.checkpoint.convert import exporting, exporting_receipt
    from megacode.checkpoint.reader import CheckpointReader

    logging.disable_progress_bar()
    checkpoint = CheckpointReader(checkpoint_folder(source))
    checkpoint.verify()  # the receipt compares with what is read here, so it would not see damaged files

    def write(check: Callable[[Path], None], bar: "Bar") -> None:
        chosen = dtype or exporting.default_dtype(checkpoint)
        exporting.export(checkpoint, target, chosen, check=check, force=force, progress=bar("writing"))

    def compare(folder: Path, progress: "Progress") -> "Receipt":
        return exporting_receipt.check_export(checkpoint, folder, texts, progress)

    _convert(write, compare, target, json_file)


def _convert(
    write: Callable[[Callable[[Path], None], "Bar"], None],
    compare: Callable[[Path, "Progress"], "Receipt"],
    target: Path,
    json_file: Path | None,
    closing: str = "",
) -> None:
    """Write, compare before the folder gets its name, and say what came out and what to do with it."""
    from megacode.checkpoint.convert.receipt import ConversionError

    receipts: list[Receipt] = []
    seconds = {"writing": 0.0, "comparing": 0.0}

    def check(folder: Path) -> None:
        started = time.perf_counter()
        receipts.append(compare(folder, bar("comparing")))
        seconds["comparing"] = time.perf_counter() - started

    with json_output(json_file) as write_json:
        try:
            with _bars() as bar:
                started = time.perf_counter()
                write(check, bar)
                seconds["writing"] = time.perf_counter() - started - seconds["comparing"]
        except ConversionError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        write_json(asdict(receipts[0]))
        _print(receipts[0], target, seconds)
        typer.echo(closing, nl=False)


def run_folder(path: Path) -> Path:
    """The run folder that a path means: itself, or the one above where its folder of checkpoints is named."""
    inside = (path / "checkpoints").is_dir() or (path / "manifest.json").exists()
    return path if inside or path.absolute().name != "checkpoints" else path.absolute().parent


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of what `run_folder` gives.

    Raises:
        UserError: there is none.
    """
    from megacode.checkpoint.keep import newest

    if not path.is_dir():
        raise UserError(f"{path} is no folder; name a run folder or one of its checkpoints/step_*")
    run = run_folder(path)
    if not (run / "checkpoints").is_dir():
        return path
    found = newest(run)
    if found is None:
        raise UserError(f"{run} has no finished checkpoint yet; train until the first (checkpoint.every_steps)")
    return found


def _texts(files: list[Path] | None) -> list[str]:
    return [_read(path) for path in files] if files else SNIPPETS


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # read_text would turn CRLF into LF
    except OSError as error:
        raise UserError(f"cannot read --text {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--text {path} is not UTF-8; name a text file") from None


@contextmanager
def _bars() -> "Iterator[Bar]":
    """On a terminal, a bar for each name that is asked for."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bars:

        def bar(what: str) -> "Progress":
            task = bars.add_task(what, total=None, visible=False)
            return lambda done, total: bars.update(task, completed=done, total=total, visible=True)

        yield bar


def _print(receipt: "Receipt", target: Path, seconds: dict[str, float]) -> None:
    for check in receipt.checks:
        figures = ", ".join(
            f"{name} {figure:.3g}" if isinstance(figure, float) else f"{name} {figure}"
            for name, figure in check.figures.items()
            if not isinstance(figure, list)
        )
        typer.echo(f"{check.name:10} agrees  {figures}".rstrip())
    for key, origin in receipt.origins.items():
        typer.echo(f"{key:14} {origin}")
    typer.echo(", ".join(f"{what} {value:.3f} s" for what, value in seconds.items()))
    what = f"step {receipt.step}" if receipt.direction == "to-hf" else receipt.direction
    typer.echo(f"{what} in {receipt.dtype} stands in {target}")
