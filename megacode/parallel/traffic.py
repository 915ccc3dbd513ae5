"""What goes over the wire: every collective and transfer of this rank, counted while somebody asks.

All calls of torch.distributed, DeepSpeed's among them, end in methods of its process groups: these are wrapped, for
whatever thread calls them. (A dispatch mode would see the operators behind them, and a test compares with one; but
under one torch can't make the causal mask of fewer queries than keys.) Training itself does not import this.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

from megacode.parallel.mesh import Mesh

METHODS = {
    "allreduce": ("all-reduce", 0),
    "allreduce_coalesced": ("all-reduce", 0),
    "all_gather_single": ("all-gather", 1),
    "all_gather_single_coalesced": ("all-gather", 1),
    "_allgather_base": ("all-gather", 1),
    "allgather": ("all-gather", 1),
    "allgather_coalesced": ("all-gather", 1),
    "allgather_into_tensor_coalesced": ("all-gather", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce-scatter", 1),
    "_reduce_scatter_base": ("reduce-scatter", 1),
    "reduce_scatter": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1),
    "all_to_all_single": ("all-to-all", 1),
    "alltoall": ("all-to-all", 1),
    "alltoall_base": ("all-to-all", 1),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "gather": ("gather", 1),
    "scatter": ("scatter", 1),
    "send": ("send", 0),
    "recv": ("receive", 0),
    "recv_anysource": ("receive", 0),
    "barrier": ("barrier", None),
    "monitored_barrier": ("barrier", None),
}
"""Method of a process group -> its kind, and which argument is what this rank gives (or receives). Some names are of
some versions of torch only."""


@dataclass(frozen=True)
class Call:
    """One collective or transfer of this rank."""

    axis: str
    """Whose group it runs in: tensor, context, data (ZeRO's, data x context), model (pipeline x tensor), pipeline
    (transfers between neighbour stages) or world."""
    kind: str
    elements: int
    """Of what this rank gives: an all-gather's own share, a reduce-scatter's whole input; of a receive what it gets."""
    bytes: int


class Traffic:
    """Notes every call of this process while it is entered; in groups of one rank nothing travels, nothing is noted."""

    def __init__(self, mesh: Mesh) -> None:
        self.calls: list[Call] = []
        world = dist.group.WORLD
        assert world is not None
        axes = (
            (world, "world"),
            (mesh.control_group, "world"),
            (mesh.model_group, "model"),
            (mesh.data_group, "data"),
            (mesh.context_group, "context"),
            (mesh.tensor_group, "tensor"),
        )
        self._axes = {group.group_name: axis for group, axis in axes if group is not None}
        # As they stand in the class: read from it, a method of a C++ class is a function that no longer binds `self`.
        self._originals = {name: vars(ProcessGroup)[name] for name in METHODS if name in vars(ProcessGroup)}

    def __enter__(self) -> "Traffic":
        for name in self._originals:
            setattr(ProcessGroup, name, self._counted(getattr(ProcessGroup, name), *METHODS[name]))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name, original in self._originals.items():
            setattr(ProcessGroup, name, original)

    def _counted(self, original: Callable[..., Any], kind: str, given: int | None) -> Callable[..., Any]:
        def counted(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if group.size() > 1:
                tensors = [] if given is None else [x for x in tree_leaves(args[given]) if isinstance(x, Tensor)]
                axis = "pipeline" if kind in ("send", "receive") else self._axes.get(group.group_name, "unknown")
                self.calls.append(Call(axis, kind, sum(x.numel() for x in tensors), sum(x.nbytes for x in tensors)))
            return original(group, *args, **kwargs)

        return counted
