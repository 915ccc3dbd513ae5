"""PREFIX.lock: one command at a time works on a prefix, or any number of tasks of one cluster job."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megacode.errors import UserError


@contextlib.contextmanager
def locked(output: str | Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a prefix. It lies beside PREFIX.parts, which can be removed meanwhile, and goes with its holder.

    Args:
        output: PREFIX.
        shared: Let others hold it that share it too.

    Raises:
        UserError: somebody else holds it, or the file system has no locks or no room.
    """
    path = Path(f"{output}.lock")
    try:
        file = _taken(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except BlockingIOError:
        raise UserError(f"another `megacode prepare` works on {output}; wait for it or end it") from None
    except OSError as error:  # also where a file system has no locks
        raise UserError(f"cannot write {path}: {error.strerror}; mend that and give the same command again") from None
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # others share it: the last one takes the file away
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _taken(path: Path, kind: int) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass  # whoever held it has taken it away since it was opened
        except BaseException:
            file.close()
            raise
        file.close()
