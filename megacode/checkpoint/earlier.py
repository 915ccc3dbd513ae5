"""What to do about a checkpoint that is damaged: which other one of its run to go on from, and how."""

import json
import re
from pathlib import Path

from megacode.checkpoint import keep


def mend(folder: Path) -> str:
    """The mend for a damaged checkpoint, in words. Nothing goes on from an earlier one by itself: steps would be lost
    unseen.

    Args:
        folder: the damaged one. Of a run's newest, the next start goes on from the newest before it that looks whole.
    """
    if not is_of_a_run(folder):
        return "bring the file back from a copy, or make the folder again"
    run = folder.parent.parent
    others = [other for other in keep.finished(run) if other.name != folder.name]
    if others and others[-1].name > folder.name:
        whole = next((other for other in reversed(others) if looks_whole(other)), None)
        no_other = "none of the run's others looks whole: bring this one back from a copy"
        return f"the run's newest that looks whole is {whole}" if whole else no_other
    away = [folder]
    for other in reversed(others):
        if looks_whole(other):
            names = " and ".join(map(str, reversed(away)))
            return f"the run has an earlier one: move {names} away, and the next start takes step {keep.step_of(other)}"
        away.append(other)
    what = "no earlier one that is whole" if others else "no earlier one"
    return f"the run has {what}: bring this one back from a copy, or move {folder.parent} away to begin again"


def looks_whole(folder: Path) -> bool:
    """Whether all files that the manifest names are there with their sizes, which is quick to see."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def is_of_a_run(folder: Path) -> bool:
    """Whether a folder is named as a checkpoint of a run is; by its name alone, for it may not be there."""
    return folder.parent.name == "checkpoints" and re.fullmatch(r"step_\d{8}", folder.name) is not None
