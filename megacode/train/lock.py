"""Keeps a run folder for one start at a time."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from datetime import datetime
from pathlib import Path

from megacode.errors import UserError

NAME = "lock"
WAIT_SECONDS = 10.0
"""How long a start waits for one that is about to end: its processes go within seconds of its last word."""
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems say that have no locks: NFS without its lock service, Lustre without `-o flock`, some of FUSE's."""


def hold(run: Path, rank: int) -> None:
    """Keep a run folder for this start, as long as its processes live. All ranks call it, each for itself.

    A rank locks the byte of its number in RUN/lock; so each rank of another start finds its own taken, with no word
    from rank 0, and all say the same. (Two that begin within the same second may refuse each other.) Rank 0 writes who
    it is. The file stays when the run ends: it is the lock that counts, and the kernel gives that back however the
    process ends. Where the file system has no locks, rank 0 says so, and the start goes on.

    Raises:
        UserError: another start has it.
        OSError: the folder can't be made or written.
    """
    run.mkdir(parents=True, exist_ok=True)
    # POSIX locks, not flock's: a forked child would inherit those, and may outlive the rank. But these go when the
    # process closes any descriptor of the file: this one stays open, and nothing else here opens RUN/lock.
    descriptor = os.open(run / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + WAIT_SECONDS
    try:
        while not _lock(descriptor, rank):
            if time.monotonic() > deadline:
                raise UserError(_refusal(run, descriptor))
            time.sleep(0.1)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        if rank == 0:
            text = f"{run} can't be locked ({error.strerror}): nothing keeps a second start out of it"
            print(text, file=sys.stderr, flush=True)
    if rank == 0:
        line = {"host": socket.gethostname(), "pid": os.getpid(), "unix_time": time.time()}
        os.ftruncate(descriptor, os.pwrite(descriptor, json.dumps(line).encode() + b"\n", 0))


def held_since_ns(run: Path) -> int:
    """When the start that holds a run folder took it, by the clock of the folder's file system [ns]."""
    return (run / NAME).stat().st_mtime_ns


def _lock(descriptor: int, rank: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _refusal(run: Path, descriptor: int) -> str:
    mend = f"stop that run (touch {run}/STOP) and wait for its end, or give another run=FOLDER"
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        since = datetime.fromtimestamp(holder["unix_time"]).astimezone().isoformat(" ", "seconds")
        who = f"process {holder['pid']} on host {holder['host']} trains in it since {since}"
        gone = holder["host"] != socket.gethostname()
    except (ValueError, KeyError, TypeError):  # it is being written
        who, gone = "another start has it", False
    if gone:
        mend += "; if that host is gone, the file server gives its locks back within some minutes"
    return f"run: {run} is in use: {who}; {mend}"
