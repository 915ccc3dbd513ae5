"""What a check finds."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "WRONG", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    name: str
    """What was looked at."""
    state: State
    """missing: megacode does without it. WRONG: training would go wrong, hang or not start; the exit code is 1."""
    text: str
    """What was found, with figures and tolerances."""
    mend: str | None = None
    """What to do about it, where there is something to do."""


def verdict(name: str, right: bool, text: str, mend: str) -> Finding:
    """ok, or WRONG with the mend."""
    return Finding(name, "ok", text) if right else Finding(name, "WRONG", text, mend)
