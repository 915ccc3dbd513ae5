"""`megacode COMMAND`: a table of the tools."""

import sys
from typing import Annotated

import typer

import megacode
from megacode.errors import UserError
from megacode.tools import (
    checkpoint,
    convert,
    data,
    demo,
    doctor,
    generate,
    plan,
    prepare,
    report,
    schedule,
    submit,
    tokenizer,
    verify,
)

app = typer.Typer(
    help="megacode: train code language models of the Code Llama family.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(megacode.__version__)
        raise typer.Exit


@app.callback()
def _megacode(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Holds what `megacode` takes before a command."""


app.command()(prepare.prepare)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(convert.app, name="convert")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(data.app, name="data")
app.command()(generate.generate)
app.command()(plan.plan)
app.command()(schedule.schedule)
app.command()(submit.submit)
app.command()(demo.demo)
app.command()(verify.verify)
app.command()(report.report)
app.command()(doctor.doctor)


def main() -> None:
    """The entry point. A user's mistake is one line and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
