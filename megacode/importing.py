"""Imports that the garbage collector leaves alone."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import large packages here: what is there at the end is never looked at again.

    torch and DeepSpeed make millions of objects that stay. The collector goes through them again and again while they
    are imported, and once more when the interpreter ends: together 1.5 s of the 3.5 s that a rank took on a core.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
