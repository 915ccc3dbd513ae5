"""Runs of text for a terminal: in colours by what they are, dimmed where there is no loss; elsewhere plain."""

import os
import sys
from collections.abc import Iterable

from megacode.data.readable import Role, Run

COLOURS: dict[Role, str] = {
    "text": "",
    "prefix": "36",  # cyan
    "middle": "32",  # green
    "suffix": "35",  # magenta
    "marker": "1;33",  # bold, yellow
    "padding": "",
}
_DIM = "2"
# What could move the cursor or speak to the terminal is shown as a picture of it; line ends and tabs stay.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def in_colours() -> bool:
    """Whether standard output takes colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(runs: Iterable[Run], colours: bool) -> str:
    """The text of runs; control characters that documents hold are made visible."""
    return "".join(_paint(run, colours) for run in runs)


def visible(text: str) -> str:
    """Text from outside without control characters."""
    return text.translate(_VISIBLE)


def legend() -> str:
    """What the colours mean, in these colours."""
    parts: tuple[Role, ...] = ("prefix", "middle", "suffix", "marker")
    return paint([*(Run(f"{part} ", part, True) for part in parts), Run("no loss", "text", False)], True)


def _paint(run: Run, colours: bool) -> str:
    text = visible(run.text)
    codes = ";".join(filter(None, [COLOURS[run.role], "" if run.loss else _DIM]))
    return f"\x1b[{codes}m{text}\x1b[0m" if colours and codes else text
