"""What survives a power loss: the name of a file may reach the disk before its content does, unless that is forced."""

import os
from pathlib import Path


def sync(*paths: Path) -> None:
    """Wait until files, or the names in folders, are on the disk."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def rename(old: Path, new: Path) -> None:
    """Give a file, or a folder of files, its final name once it is on the disk; what has that name is replaced."""
    sync(*(old.iterdir() if old.is_dir() else ()), old)
    os.replace(old, new)
    sync(new.parent)
