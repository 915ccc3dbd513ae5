"""Which checkpoints of a run stand, and which of them are kept."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megacode.data.durable import sync

PARTIAL = ".partial"
"""Ends the name of a checkpoint that is being written, or whose writing was cut short."""
LATEST = "latest"
"""A file of RUN/checkpoints with the name of the newest one, for scripts and other tools; nothing here goes by it. It
is a file and not a link since some file systems have no links."""
REMOVED = ".removed"
"""Ends the name, hidden by a dot, of one that is being removed: half of it never looks like a checkpoint."""


def finished(run: Path) -> list[Path]:
    """The checkpoints of a run that stand whole, oldest first: a folder has such a name only then."""
    return sorted((run / "checkpoints").glob("step_" + "[0-9]" * 8))


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run: what a start goes on from."""
    folders = finished(run)
    return folders[-1] if folders else None


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def surplus(run: Path, last: int, every: int | None = None) -> list[Path]:
    """The checkpoints of a run that are not to be kept, oldest first.

    Args:
        run: the run folder.
        last: how many of the newest are kept, at least one.
        every: kept are those of the multiples of this step, too.
    """
    assert last >= 1, "the newest is what the run goes on from"
    return [folder for folder in finished(run)[:-last] if every is None or step_of(folder) % every]


def remove(folder: Path) -> None:
    """Remove a checkpoint; one that somebody else is removing is left to him.

    Raises:
        OSError: it can't be removed; it no longer has a checkpoint's name, unless that can't be changed.
    """
    hidden = folder.with_name(f".{folder.name}{REMOVED}")
    _remove_tree(hidden)  # of an earlier one of this step
    try:
        os.replace(folder, hidden)
    except FileNotFoundError:
        return
    sync(folder.parent)
    _remove_tree(hidden)


def leftovers(run: Path) -> list[Path]:
    """What is half written, or half removed; while nobody writes or removes, killed runs have left it."""
    folder = run / "checkpoints"
    return [*folder.glob(f"step_*{PARTIAL}"), *folder.glob(f".step_*{REMOVED}")]


def point_to(folder: Path) -> None:
    """Have LATEST name a checkpoint.

    Raises:
        OSError: it can't be written.
    """
    temporary = folder.with_name(f".{LATEST}.tmp")
    temporary.write_text(folder.name + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, folder.with_name(LATEST))
    sync(folder.parent)


def sweep(run: Path) -> None:
    """Remove what killed runs have left, and have LATEST name the newest. No other process may be saving in the folder.

    Raises:
        OSError: it can't be done.
    """
    for leftover in leftovers(run):
        _remove_tree(leftover)
    last = newest(run)
    if last is not None and _latest(run) != last.name:  # a kill before it was moved; newer ones that were removed
        point_to(last)


def _latest(run: Path) -> str | None:
    try:
        return (run / "checkpoints" / LATEST).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _remove_tree(folder: Path) -> None:
    if folder.is_symlink():  # to a checkpoint that lies elsewhere: that is not this run's to remove
        folder.unlink()
        return

    def unless_gone(function: Callable[..., Any], path: str, error: Any) -> None:
        if not isinstance(error[1], FileNotFoundError):
            raise error[1]

    shutil.rmtree(folder, onerror=unless_gone)
