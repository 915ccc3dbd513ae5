"""Prints findings as they come, and keeps them."""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from megacode.doctor.finding import Finding

WIDTH = 100
STATE_WIDTH, NAME_WIDTH = 8, 23
INDENT = STATE_WIDTH + NAME_WIDTH + 1
STYLES = {"ok": "green", "missing": "yellow", "WRONG": "bold red", "skipped": "dim"}


class Report:
    """The doctor's lines on standard output: coloured in a terminal, plain elsewhere, never wider than 100 columns."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.sections: dict[str, list[Finding]] = {}

    def add(self, section: str, findings: Iterator[Finding]) -> None:
        """Run the checks of a section, printing each finding as soon as it is there."""
        if section not in self.sections:
            self.console.print(Text(f"{'' if not self.sections else chr(10)}{section}", style="bold"))
            self.sections[section] = []
        with self.console.status(section):  # nothing where it is no terminal
            for finding in findings:
                self.sections[section].append(finding)
                self._print(finding)

    def _print(self, finding: Finding) -> None:
        text = finding.text if finding.mend is None else f"{finding.text}\nmend: {finding.mend}"
        lines = [
            part
            for line in text.splitlines()
            # Paths and commands stay in one piece, to be copied.
            for part in textwrap.wrap(line, WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
        ]
        if len(finding.name) > NAME_WIDTH:  # a line of its own
            lines.insert(0, "")
        line = Text.assemble(
            (f"{finding.state:<{STATE_WIDTH}}", STYLES[finding.state]),
            f"{finding.name:<{NAME_WIDTH}} ",
            f"\n{' ' * INDENT}".join(lines),
        )
        line.rstrip()
        self.console.print(line)

    @property
    def findings(self) -> list[Finding]:
        """All of them, in order."""
        return [finding for findings in self.sections.values() for finding in findings]

    @property
    def exit_code(self) -> int:
        """1 when something would train wrongly."""
        return int(any(finding.state == "WRONG" for finding in self.findings))

    def summary(self) -> None:
        """The last line."""
        wrong = [finding.name for finding in self.findings if finding.state == "WRONG"]
        self.console.print()
        if wrong:
            self.console.print(Text(_fold(f"WRONG: {', '.join(wrong)}"), style=STYLES["WRONG"]))
        else:
            self.console.print(Text("Nothing here would train wrongly.", style=STYLES["ok"]))

    @property
    def values(self) -> dict[str, Any]:
        """All findings as plain values: exit_code, and for each section a list of name, state, text and mend."""
        sections = {name: [asdict(finding) for finding in findings] for name, findings in self.sections.items()}
        return {"exit_code": self.exit_code, "sections": sections}


def _fold(text: str) -> str:
    """A line as lines of at most 100 columns."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")
