"""Processes forked from one that has the libraries imported: each would else take seconds for that."""

import functools
import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}


@functools.cache
def forking() -> Any:
    """The context of multiprocessing that starts them, for the CPU: CUDA does not stand a fork."""
    before = dict(os.environ)
    # The server does not get our sys.path.
    paths = [str(Path(__file__).parents[1]), *filter(None, [before.get("PYTHONPATH")])]
    os.environ.update(ENVIRONMENT, CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join(paths))
    try:
        forkserver.set_forkserver_preload(["support.preloaded"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return multiprocessing.get_context("forkserver")
