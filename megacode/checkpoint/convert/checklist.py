"""checklist.chk, which lies beside Meta's files: their md5, as `md5sum` writes and checks them.

Two model-parallel files that are swapped, or one of another model of the same shape, have tensors of the right names
and shapes, and whatever reads them in that order agrees with itself: only their checksums tell.
"""

import hashlib
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megacode.checkpoint.convert.weights import Progress
from megacode.errors import UserError

NAME = "checklist.chk"
_READ_BYTES = 16 * 2**20
_THREADS = 4
"""Files that are hashed at a time: a disk of NVMe reads faster than one core makes md5."""


def read_checklist(folder: Path, weights: Sequence[str]) -> dict[str, str] | None:
    """Name -> md5 of each file that the checklist names and that is there; None: there is no checklist.

    Args:
        folder: of Meta's files.
        weights: names of the files of weights; all of them must be named, and no other of their kind.

    Raises:
        UserError: a line is none of md5sum's, or the checklist is one of other files.
    """
    path = folder / NAME
    if not path.exists():
        return None
    sums = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); fetch it again, or remove it") from None
    for number, line in enumerate(lines, 1):
        found = re.fullmatch(r"([0-9a-f]{32})\s+\*?(?:\./)?([^/\s]+)\s*", line, re.IGNORECASE)
        if found is not None:
            sums[found[2]] = found[1].lower()
        elif line.strip():
            raise UserError(f"{path}: line {number} is none of md5sum's; fetch it again, or remove it")
    named = {name for name in sums if re.fullmatch(r"consolidated\..*\.pth", name)}
    if other := sorted(named.symmetric_difference(weights)):
        who, mend = (NAME, "that file") if other[0] in named else ("the folder", NAME)
        raise UserError(f"{folder}: only {who} has {other[0]}; fetch {mend} again, or remove {NAME}")
    return {name: md5 for name, md5 in sums.items() if (folder / name).is_file()}


def compare(folder: Path, sums: dict[str, str], progress: Progress = lambda done, total: None) -> None:
    """Read files whole and compare their md5.

    Args:
        folder, sums: what `read_checklist` gives.
        progress: called with bytes read and bytes to read.

    Raises:
        UserError: names the file whose checksum differs.
    """
    total, done, lock = sum((folder / name).stat().st_size for name in sums), 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress(done, total)

    def md5(name: str) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        try:
            with (folder / name).open("rb", buffering=0) as file:
                while data := file.read(_READ_BYTES):
                    digest.update(data)
                    advance(len(data))
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read ({error.strerror}); see that it stays") from None
        return digest.hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(sums, pool.map(md5, sums), strict=True))
    for name, expected in sums.items():
        if found[name] != expected:
            same = next((other for other, each in sums.items() if each == found[name]), None)
            if same:
                raise UserError(f"{folder / name} is {same} by the md5 in {NAME}; give the files their own names")
            raise UserError(
                f"{folder / name} has not the md5 that {NAME} says; fetch it again, and {NAME}, the first of which "
                f"were wrong for params.json of Code Llama 70B"
            )
