"""`megacode report`: a run as one self-contained HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from megacode.errors import UserError


def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[Path | None, typer.Option(help="Where the page goes; left out, RUN/report.html.")] = None,
) -> None:
    """Make one HTML page of a run: curves, throughput, memory, mixture, layout, schedule, environment, checkpoints.

    The page needs no network and no script. The run may still be going on, or have failed.

    Example: megacode report runs/demo/run
    """
    from megacode.tools.report.page import make_page
    from megacode.tools.report.run import read_run

    page = make_page(read_run(run))
    path = output or run / "report.html"
    try:
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file with --output") from None
    typer.echo(path)
