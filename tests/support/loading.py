"""Streams that worker processes of the loader read from, and a mesh without processes."""

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacode.data.packing import MicroBatch
from megacode.data.shards import Shards
from megacode.errors import UserError
from megacode.parallel.mesh import Mesh

LENGTH = 8


@dataclass(frozen=True)
class Numbers:
    """Every token of a sample is the sample's number; some numbers bring trouble."""

    damaged: int = -1
    deadly: int = -1
    slow: int = -1
    log: Path | None = None

    def micro_batch(self, indices):
        if self.damaged in indices:
            raise UserError("the shard is damaged; prepare it again")
        if self.deadly in indices:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.slow in indices:
            time.sleep(1)
        if self.log is not None:
            (self.log / str(os.getpid())).touch()
        tokens = np.repeat(np.array(indices)[:, None], LENGTH, axis=1)
        positions = np.broadcast_to(np.arange(LENGTH), tokens.shape).copy()
        return MicroBatch(
            tokens, tokens.copy(), positions, tokens % 2 == 1, np.zeros(len(indices), np.int64), cu_seqlens=None,
            counts=Counter(uncut=len(indices), infilled=sum(number % 2 for number in indices), padding=5),
        )  # fmt: skip


@dataclass(frozen=True)
class Truncated:
    """A shard whose index is cut short between two looks at it."""

    prefix: Path

    def micro_batch(self, indices):
        shards = Shards(self.prefix)
        shards.document(0)
        os.truncate(f"{self.prefix}.idx", 0)
        return shards.document(shards.num_documents - 1)


def mesh(**changes):
    """A rank's place in a layout, as far as the loader looks at it."""
    values = {"pipeline": 1, "data": 1, "tensor": 1, "context": 1, "pipeline_rank": 0, "data_rank": 0, "tensor_rank": 0}
    made = object.__new__(Mesh)
    for name, value in {**values, "context_rank": 0, **changes}.items():
        object.__setattr__(made, name, value)
    return made
