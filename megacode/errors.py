"""The one exception that means: the user can mend this."""

import errno


class UserError(ValueError):
    """A mistake in what the user gave (recipe, file, command line).

    The message is one line that names the key or the file and says the mend. Commands print it and exit with code 2;
    every other exception is a defect of megacode and keeps its traceback.
    """


_FULL = "make room on that disk"
_FORBIDDEN = "mend its mode, or how its disk is mounted"
_GONE = "bring its disk back (is it mounted?)"
MENDS = {
    errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: _FORBIDDEN, errno.EACCES: _FORBIDDEN, errno.EPERM: _FORBIDDEN,
    errno.ENOTDIR: "remove the file that stands where a folder should",
    errno.ENOENT: _GONE, errno.ESTALE: _GONE, errno.EIO: _GONE, errno.ENOTCONN: _GONE,
    errno.ENODEV: _GONE, errno.ETIMEDOUT: _GONE, errno.EHOSTDOWN: _GONE,
}  # fmt: skip
"""Errors of files that the user can mend, and how."""


def explain(error: OSError, path: object) -> str:
    """A file's name, what is wrong, and the mend: one line.

    Args:
        error: of an operation on files.
        path: the file, where the error names none: a failed write does not.
    """
    mend = MENDS.get(error.errno or 0, "mend that")
    return f"{error.filename or path}: {error.strerror or error}; {mend}"
