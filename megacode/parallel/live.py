"""How many bytes of tensors are alive on this rank, and the most there ever were. Training does not import this."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


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
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
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


@contextmanager
def uncounted_on_cpu(dtype: torch.dtype) -> Iterator[None]:
    """What torch makes on a CPU and GPUs do without is made outside of what is counted.

    Masks for attention of fewer queries than keys (under a dispatch mode torch can't make the class that stands for
    them, either), and gloo's copy of what it reduces and scatters. Collectives that are waited for at once exchange
    copies: gloo's threads let go of what they exchanged some time after, or later under load. DeepSpeed must have
    started: it looks up collectives once.
    """
    backend = sys.modules["deepspeed.comm.comm"].cdb

    @functools.cache
    def lower_right(queries: int, keys: int) -> Tensor:
        with _disable_current_modes():
            hidden = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).logical_not()
            return torch.zeros(queries, keys, dtype=dtype).masked_fill(hidden, float("-inf"))

    def uncounted(collective: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(collective).parameters)  # first comes what it writes

        def run(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            with _disable_current_modes():
                if given.get("async_op"):
                    return collective(**given)
                copies = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
                collective(**{**given, **copies})
                given[names[0]].copy_(copies[names[0]])
            return None

        return run

    with (
        mock.patch("torch.nn.attention.bias.causal_lower_right", lower_right),
        mock.patch("torch.distributed.all_reduce", uncounted(dist.all_reduce)),
        mock.patch("torch.distributed.all_gather_into_tensor", uncounted(dist.all_gather_into_tensor)),
        mock.patch("torch.distributed.reduce_scatter_tensor", uncounted(dist.reduce_scatter_tensor)),
        mock.patch.object(backend, "all_gather_function", uncounted(backend.all_gather_function)),
        mock.patch.object(backend, "reduce_scatter_function", uncounted(backend.reduce_scatter_function)),
    ):
        yield
