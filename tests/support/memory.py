"""Live tensor bytes of a rank of our own engine at the peak of a step."""

from __future__ import annotations

import gc
import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megacode.model.layers import initial_values, part_of
from megacode.plan.layout import fit
from megacode.recipe import Recipe
from support.training import SEED, _mesh, micro_batches, samples


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations return: autograd's saved tensors and DeepSpeed's flat buffers among them.

    The allocator's own report, torch's profiler, misses what gloo's threads free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.upper = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        known = self.storages.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.upper += storage.nbytes()
        if self.upper > self.peak:  # what was freed since the last count does not count
            self.peak = max(self.peak, self.count())

    def count(self) -> int:
        """Bytes that live now."""
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.upper = sum(size for _, size in self.storages.values())
        return self.upper


def live_bytes(config: Recipe) -> dict[str, int]:
    """This rank's live bytes: what lies there when the last step begins (`static`), and at the worst moments of its
    schedule and of its update.
    """
    from megacode.engine.zero import ZeroEngine, start_deepspeed
    from megacode.parallel import mesh as meshes

    importlib.import_module("torch._dynamo")  # zero.Init imports it while torch.Tensor is patched, which it refuses
    start_deepspeed()
    layout = fit(config, dist.get_world_size())
    mesh = _mesh(meshes.build_mesh, layout.pipeline, layout.data, layout.tensor, layout.context)
    batches = micro_batches(config, mesh, *samples(config, 0))
    found = {}
    with LiveBytes() as live:
        engine = ZeroEngine(config, layout, mesh, torch.device("cpu"))
        for name, parameter in engine.parameters.items():
            engine.write(name, part_of(parameter).take(initial_values(name, part_of(parameter), SEED)))
        for _ in range(3 if config.parallel.zero == 3 else 2):  # ZeRO-3's trace is complete from the third step on
            gc.collect()
            found["static"] = live.peak = live.count()
            engine.train_step(batches, 1e-3)
            found["schedule"], live.peak = live.peak, live.count()
            engine.update(1e-3)
            found["update"] = live.peak
    engine.engine.destroy()
    return found
