"""`--json FILE` of all commands: what was found, for programs, beside the text that is printed."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from megacode.errors import UserError

JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write all of it as JSON; - means standard output, and the text goes to standard error then.",
    ),
]


@contextlib.contextmanager
def json_output(file: Path | None) -> Iterator[Callable[..., None]]:
    """What writes a command's result to the file that `--json` names; it does nothing where none is named.

    `write(values, whole=False)` writes as far as a long command has come: to a file, not to standard output.

    For `-` the result alone goes to standard output: what is printed within goes to standard error.

    Raises:
        UserError: the file can't be written; where its folder is missing, before any work.
    """
    aside = file == Path("-")
    if file is not None and not aside and not file.absolute().parent.is_dir():
        raise UserError(f"--json: {file.parent} is no folder; make it, or name another file")
    stdout = sys.stdout

    def write(values: Any, whole: bool = True) -> None:
        text = json.dumps(values, indent=1) + "\n"
        if aside:
            stdout.write(text if whole else "")
        elif file is not None:
            try:
                file.write_text(text, encoding="utf-8")
            except OSError as error:
                raise UserError(f"--json: cannot write {file}: {error.strerror}; name another file") from None

    with contextlib.redirect_stdout(sys.stderr) if aside else contextlib.nullcontext():
        yield write
