"""Processes that save again and again until they are killed; started as a script, forks one for each line of stdin.

A line is `RUN RANKS SLOW SEED`; the answer, on stdout, the process ids of its ranks. Each writes to RUN/marks when a
save begins ("b STEP") and when it stands ("e STEP"). A line without words waits for the last one's end.
"""

import functools
import itertools
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import torch

from megacode.checkpoint import keep
from megacode.checkpoint.reader import CheckpointReader, Progress
from megacode.checkpoint.store import Writer, save, step_folder
from megacode.model.layers import Slice
from support.training import recipe

ALONE = Writer(rank=0, zero_rank=0, tensor_rank=0, gather=lambda each: [each], broadcast=lambda each: each)
PARTS = {f"model.layers.{number}.mlp.up_proj.weight": Slice((96, 300), 0.02) for number in range(6)}
NUM_BYTES = 3 * 4 * 6 * 96 * 300
"""Of the tensors."""


def config(run, **checkpoint):
    """A recipe with such a section and a tokenizer's file; a save looks into neither."""
    tokenizer = run / "tokenizer.model"
    if not tokenizer.exists():
        tokenizer.write_bytes(b"any" * 100)
    return recipe(run=str(run), tokenizer={"path": str(tokenizer)}, checkpoint=checkpoint)


class Held:
    """A `Holder` without an engine: data ranks keep parameters in turn, `fill(into, name, key)` fills them."""

    def __init__(self, names, fill, ranks=1):
        self._keepers, self._fill = {name: number % ranks for number, name in enumerate(names)}, fill

    def keepers(self):
        return self._keepers

    def gather(self, pieces):
        for name, key, _, into in pieces:
            if into is not None:
                self._fill(into, name, key)


def held(step, ranks=1):
    """Whose every value tells the step."""
    return Held(PARTS, lambda into, *_: into.fill_(float(step)), ranks)


def save_step(run, step, writer=ALONE, ranks=1):
    """Save a step, all of whose values are its number."""
    progress = Progress(step, 8 * step, step, 7, 16, 0)
    save(step_folder(run, step), config(run), progress, PARTS, held(step, ranks), writer)


def assert_whole(folder):
    """A checkpoint of `save_step` is whole, and of one step only."""
    reader = CheckpointReader(folder)
    reader.verify()
    assert reader.step == keep.step_of(folder)
    assert reader.names == list(PARTS)
    for name in reader.names:
        for key in ("weight", "exp_avg", "exp_avg_sq"):
            assert (reader.read(name, key) == reader.step).all(), (name, key)


def _pair(rank, pipe):
    """One of two data ranks, which talk through a pipe."""

    def gather(value):
        if rank:
            pipe.send(value)
            return None
        return [value, pipe.recv()]

    def broadcast(value):
        if rank:
            return pipe.recv()
        pipe.send(value)
        return value

    return Writer(rank, rank, 0, gather, broadcast)


def _save_on_and_on(run, writer, ranks, slow, seed):
    generator = random.Random(seed)
    if slow:  # a kill hits the moments around names' changes more often
        replace = os.replace

        def linger(*names):
            time.sleep(generator.random() * 0.02)
            replace(*names)
            time.sleep(generator.random() * 0.02)

        os.replace = linger
    newest = keep.newest(run)
    if writer.rank == 0 and seed % 2:
        keep.sweep(run)  # as a start does; else the next save of the step takes away what is left
    with (run / "marks").open("a", buffering=1) as marks:
        for step in itertools.count(keep.step_of(newest) + 1 if newest else 1):
            if writer.rank == 0:
                marks.write(f"b {step}\n")
            save_step(run, step, writer, ranks)
            if writer.rank == 0:
                marks.write(f"e {step}\n")
                for folder in keep.surplus(run, last=2):
                    keep.remove(folder)


def _fork(action):
    pid = os.fork()
    if not pid:
        try:
            action()
        finally:
            os._exit(1)
    return pid


def serve():
    torch.set_num_threads(1)
    pids = []
    for line in sys.stdin:
        if not line.split():
            for pid in pids:
                os.waitpid(pid, 0)
            print("ended", flush=True)
            continue
        run, ranks, slow, seed = line.split()
        pipes = multiprocessing.Pipe() if ranks == "2" else (None,)
        writers = [ALONE] if ranks == "1" else [_pair(rank, pipe) for rank, pipe in enumerate(pipes)]
        pids = [
            _fork(functools.partial(_save_on_and_on, Path(run), writer, len(writers), slow == "1", int(seed)))
            for writer in writers
        ]
        for pipe in pipes:
            if pipe is not None:
                pipe.close()
        print(*pids, flush=True)


if __name__ == "__main__":
    serve()
