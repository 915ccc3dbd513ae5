"""Where a conversion stands: written beside its target, checked, then renamed. The target is whole or not there."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megacode.data import durable
from megacode.errors import UserError
from megacode.plan.units import size

RECEIPT = "conversion_receipt.json"
"""Name of the file that marks a folder as a conversion of megacode."""

CARRIED = "source"
"""Folder within a converted checkpoint: what an export needs again of the source's own files."""


@contextmanager
def written_beside(
    folder: Path, *, source: Path, force: bool, needed_bytes: int, check: Callable[[Path], None]
) -> Iterator[Path]:
    """A new folder that gets the name `folder` when the block has filled it and the check passed.

    Args:
        folder: missing, or empty, or with `force` an earlier conversion and nothing else.
        source: the folder that is converted; neither lies in the other.
        force: replace an earlier conversion.
        needed_bytes: what will be written.
        check: called with the folder; where it raises, the folder keeps its own name and stays, to be looked at.

    Raises:
        UserError: the target is taken, or its disk too small or not writable.
    """
    folder = folder.resolve()
    written = temporary_folder(folder)
    _check_apart(source.resolve(), folder, written)
    _check_target(folder, force)
    try:
        if written.exists():  # left by a conversion that was killed or disagreed
            shutil.rmtree(written)
        _check_space(folder.parent, needed_bytes)
        written.mkdir(parents=True)
        yield written
    except OSError as error:
        shutil.rmtree(written, ignore_errors=True)
        raise _not_writable(folder, error) from None
    except UserError:
        shutil.rmtree(written, ignore_errors=True)
        raise
    check(written)
    _check_target(folder, force)  # the conversion of a large model takes long enough to put something there
    try:
        _replace(written, folder)
    except OSError as error:
        raise _not_writable(folder, error) from None


def _not_writable(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or " ".join(str(error).split())
    return UserError(f"{folder} cannot be written ({reason}); make room or name a folder on another disk")


def temporary_folder(folder: Path) -> Path:
    """Where a conversion stands until it is checked."""
    return folder.with_name(f".{folder.name}.converting")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_apart(source: Path, folder: Path, written: Path) -> None:
    for each in (folder, written):
        if source == each:
            raise UserError(f"{each} is what is converted; name another folder to write")
        if source in each.parents or each in source.parents:
            inner, outer = (each, source) if source in each.parents else (source, each)
            raise UserError(
                f"{inner} lies in {outer}, and one of them is converted into the other; name another folder"
            )


def _check_target(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder to write")
    if not any(folder.iterdir()):
        return
    if not (folder / RECEIPT).is_file():
        raise UserError(f"{folder} is not empty and no conversion of megacode; name another folder")
    if not force:
        raise UserError(f"{folder} holds an earlier conversion; name another folder or replace it with --force")
    foreign = _foreign(folder)
    if foreign is not None:
        raise UserError(
            f"{foreign} is not of the conversion that --force would replace ({RECEIPT} lists its files); move it away, "
            f"or name another folder"
        )


def _foreign(folder: Path) -> Path | None:
    """The first file that the receipt of a conversion does not list.

    Raises:
        UserError: the receipt is damaged.
    """
    path = folder / RECEIPT
    try:
        known = {RECEIPT, *json.loads(path.read_text(encoding="utf-8"))["sha256"]}
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{path} is damaged; remove {folder} yourself if nothing in it is needed") from None
    files = (each for each in sorted(folder.rglob("*")) if each.is_symlink() or not each.is_dir())
    return next((file for file in files if str(file.relative_to(folder)) not in known), None)


def _check_space(parent: Path, needed_bytes: int) -> None:
    while not parent.exists():
        parent = parent.parent
    usage = shutil.disk_usage(parent)
    if usage.total and usage.free < needed_bytes:  # a file system without a total, as /proc, does not say what is free
        raise UserError(
            f"{parent} has {size(usage.free)} free and the conversion takes {size(needed_bytes)}; "
            "make room or name a folder on another disk"
        )


def _replace(written: Path, folder: Path) -> None:
    """Give the written folder its name; an earlier conversion goes away only after the new one stands."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        os.replace(folder, old)
    durable.rename(written, folder)
    if old.exists():
        shutil.rmtree(old)
