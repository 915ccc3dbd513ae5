"""What a rank's step sends, in any layout: counted by the tool's own counter, and by instruments that check it."""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megacode.parallel import mesh as meshes
from megacode.parallel.traffic import Call, Traffic
from megacode.plan.layout import fit
from megacode.recipe import Recipe
from megacode.tools.bench.communication import count_step
from support.training import _mesh


def own_mesh(config: Recipe) -> Any:
    """The layout's mesh, made once a process."""
    layout = fit(config, dist.get_world_size())
    return _mesh(meshes.build_mesh, layout.pipeline, layout.data, layout.tensor, layout.context)


def step_calls(config: Recipe) -> list[Call]:
    """This rank's calls of one step."""
    return count_step(config, own_mesh(config))


OPERATORS = {
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 1),
    "allgather_": ("all-gather", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
    "recv_": ("receive", 0),
    "barrier": ("barrier", None),
}
"""Operator -> its kind, and which argument is given. Any other is an error, so that none is overlooked."""


class Operators(TorchDispatchMode):
    """The collectives that torch's dispatcher sees, in groups of several ranks: (kind, elements given) -> how often."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            kind, given = OPERATORS[func.overloadpacket.__name__]
            groups = [a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
            if dist.ProcessGroup.unbox(groups[0]).size() > 1:
                leaves = [] if given is None else tree_leaves(args[given])
                self.seen[kind, sum(x.numel() for x in leaves if isinstance(x, torch.Tensor))] += 1
        return func(*args, **(kwargs or {}))


def counted_twice(config: Recipe) -> tuple[Counter, Counter]:
    """(kind, elements) of all calls from the engine's making on: by our counter, and by the dispatcher's operators."""
    importlib.import_module("torch._dynamo")  # zero.Init imports it while torch.Tensor is patched, which it refuses
    mesh = own_mesh(config)
    with Traffic(mesh) as traffic, Operators() as operators:
        count_step(config, mesh)
    return Counter((call.kind, call.elements) for call in traffic.calls), operators.seen


@dataclass
class Fetched:
    """What ZeRO-3's coordinator did in a step."""

    gathers: Counter = field(default_factory=Counter)
    """By parameter."""
    late: int = 0
    """Modules whose parameters had not been asked for when the module first came to run: nothing hides that gather."""
    modules: set[int] = field(default_factory=set)
    """Those with parameters."""


@contextlib.contextmanager
def watched() -> Iterator[list[Fetched]]:
    """Notes each step's fetches."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
    from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params, z3_leaf_module

    steps: list[Fetched] = []
    name = "_PartitionedParameterCoordinator__all_gather_params_"
    reset, fetch, gather = Coordinator.reset_step, Coordinator.fetch_sub_module, getattr(Coordinator, name)

    def missing(parameters: Any) -> list[int]:
        return [p.ds_id for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]

    def new_step(self: Any) -> None:
        steps.append(Fetched())
        reset(self)

    def fetched(self: Any, module: Any, forward: bool) -> Any:
        parameters = list(iter_params(module, recurse=z3_leaf_module(module)))
        if parameters and module.ds_id not in steps[-1].modules:
            steps[-1].modules.add(module.ds_id)
            steps[-1].late += bool(missing(parameters))
        return fetch(self, module, forward=forward)

    def gathered(self: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
        steps[-1].gathers.update(missing(parameters))
        return gather(self, parameters, *args, **kwargs)

    with (
        mock.patch.object(Coordinator, "reset_step", new_step),
        mock.patch.object(Coordinator, "fetch_sub_module", fetched),
        mock.patch.object(Coordinator, name, gathered),
    ):
        yield steps


def step_fetches(config: Recipe) -> tuple[list[int], int, int]:
    """Of one step: the number of gathers of each parameter, modules whose gather came late, modules with parameters."""
    with watched() as steps:
        count_step(config, own_mesh(config))
    return list(steps[-1].gathers.values()), steps[-1].late, len(steps[-1].modules)


class RandomStream:
    """Samples for a Trainer, as `TrainStream` gives them, of two sources."""

    sources = ("one", "other")

    def __init__(self, config: Recipe) -> None:
        self.config = config

    def micro_batch(self, indices: Any) -> Any:
        from megacode.data.stream import MicroBatch

        random = np.random.default_rng(list(indices))
        shape = len(indices), self.config.batch.sequence_length
        tokens = random.integers(0, self.config.model.vocabulary or 0, shape)
        positions = np.broadcast_to(np.arange(shape[1]), shape)
        infilled = random.integers(0, 2, shape) == 1
        return MicroBatch(tokens, tokens, positions, infilled, np.arange(shape[0]) % 2, cu_seqlens=None)


def trainer_calls(config: Recipe) -> list[Call]:
    """This rank's calls of a Trainer's third step: label counts, losses and requests too."""
    from megacode.checkpoint.reader import Progress
    from megacode.engine.zero import ZeroEngine, start_deepspeed
    from megacode.model.layers import initial_values, part_of
    from megacode.train.faults import Requests
    from megacode.train.loop import Trainer

    start_deepspeed()
    mesh, layout, device = own_mesh(config), fit(config, dist.get_world_size()), torch.device("cpu")
    stream: Any = RandomStream(config)
    engine = ZeroEngine(config, layout, mesh, device, num_groups=2 * len(stream.sources))
    for name, parameter in engine.parameters.items():
        part = part_of(parameter)
        engine.write(name, part.take(initial_values(name, part, 7)))
    progress = Progress(0, 0, 0, 7, config.batch.sequence_length, 0)
    requests = Requests(Path("nowhere"), looks=False)
    trainer = Trainer(config, layout, mesh, device, engine, stream, None, progress, requests, journal=None)
    for _ in range(3):
        with Traffic(mesh) as traffic:
            trainer.step()
    engine.engine.destroy()
    return traffic.calls
