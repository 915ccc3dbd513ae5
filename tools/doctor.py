"""`megacode doctor`: what is installed, which backends serve, and whether training here would be right."""

from typing import Annotated

import typer

from megacode.tools.output import JsonFile, json_output


def doctor(
    processes: Annotated[
        int | None,
        typer.Option(min=2, help="Processes of the parallel self-tests; left out, one a GPU, or 4 on the CPU."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what needs several processes.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Check the installation, and train a tiny model to see that training here would be right.

    Prints versions and what is missing with how to get it, the backend of each kernel with the reason, and self-tests:
    kernels, document masks, parallel layouts, clipping, links. docs/doctor.md says what each one does.
    Exits with 1 when something would train wrongly.

    Example: megacode doctor --processes 8
    """
    from megacode.doctor.report import Report
    from megacode.doctor.run import run

    report = Report()
    with json_output(json_file) as write_json:
        run(report, processes, quick)
        report.summary()
        write_json(report.values)
    raise typer.Exit(report.exit_code)
