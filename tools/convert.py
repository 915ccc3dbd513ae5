"""`megacode convert`: from a checkpoint of a run to a HuggingFace folder."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megacode.errors import UserError
from megacode.tools.output import JsonFile, json_output

if TYPE_CHECKING:
    from megacode.checkpoint.hf import Progress
    from megacode.checkpoint.receipt import Receipt

app = typer.Typer(help="Convert checkpoints.", no_args_is_help=True)

SNIPPETS = [
    'def mean(values: list[float]) -> float:\n    """The average."""\n    return sum(values) / len(values)\n',
    '#include <stdio.h>\r\n\r\nint main(void) {\r\n\tprintf("%d\\n", 0x7fffffff);\r\n\treturn 0;\r\n}\r\n',
    "  - name: größe\n    note: 漢字, кириллица, \U0001f600\n    pi: 3.14159265358979\n",
    "class Node:\n        def __init__(self, next=None):\n                self.next = next  # </s> is text here\n",
    "SELECT id, COUNT(*) FROM users WHERE age >= 18 GROUP BY id HAVING COUNT(*) > 1 ORDER BY 2 DESC;\n",
]
"""What the receipt compares on if no --text is given."""


@app.callback()
def _group() -> None:
    """Keeps `to-hf` a word of its own while it is the only command."""


@app.command("to-hf")
def to_hf(
    source: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A step folder, or a run folder: its newest.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    dtype: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="Type of the weights; left out, the precision of the run.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Code to compare on, instead of a few snippets; repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in DST.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Export a checkpoint for transformers, and prove that it computes the same.

    The receipt loads the export with transformers in fp32 on the CPU (4 bytes of memory a parameter) and compares it
    with the checkpoint: config, every value, logits, rotary pairs, token ids. DST gets its name only when all agree,
    and holds conversion_receipt.json then; else the command exits with 1 and names what disagrees.

    Example: megacode convert to-hf runs/demo exports/demo
    """
    texts = [_read(path) for path in text] if text else SNIPPETS

    from transformers.utils import logging

    from megacode.checkpoint import hf, receipt
    from megacode.checkpoint.reader import CheckpointReader

    logging.disable_progress_bar()
    with json_output(json_file) as write_json:
        checkpoint = CheckpointReader(checkpoint_folder(source))
        checkpoint.verify()  # the receipt compares with what is read here, so it would not see damaged files
        receipts: list[receipt.Receipt] = []

        def check(folder: Path) -> None:
            with _bar("comparing") as progress:
                receipts.append(receipt.check_export(checkpoint, folder, texts, progress))

        try:
            with _bar("writing") as progress:
                chosen = dtype or checkpoint.precision
                hf.export(checkpoint, target, chosen, check=check, force=force, progress=progress)
        except receipt.ConversionError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        write_json(asdict(receipts[0]))
        _print(receipts[0], target)


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run folder.

    Raises:
        UserError: there is none.
    """
    from megacode.checkpoint.store import newest

    if not path.is_dir():
        raise UserError(f"{path} is no folder; name a run folder or one of its checkpoints/step_*")
    if not (path / "checkpoints").is_dir():
        return path
    found = newest(path)
    if found is None:
        raise UserError(f"{path} has no finished checkpoint yet; train until the first (checkpoint.every_steps)")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # read_text would turn CRLF into LF
    except OSError as error:
        raise UserError(f"cannot read --text {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--text {path} is not UTF-8; name a text file") from None


@contextmanager
def _bar(what: str) -> "Iterator[Progress]":
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), disable=not sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(receipt: "Receipt", target: Path) -> None:
    for check in receipt.checks:
        figures = ", ".join(
            f"{name} {figure:.3g}" if isinstance(figure, float) else f"{name} {figure}"
            for name, figure in check.figures.items()
            if not isinstance(figure, list)
        )
        typer.echo(f"{check.name:10} agrees  {figures}".rstrip())
    typer.echo(f"step {receipt.step} in {receipt.dtype} stands in {target}")
