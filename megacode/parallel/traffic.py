"""What goes over the wire: every collective and transfer of this rank, counted while somebody asks.

torch.distributed's calls arrive as operators of torch's dispatcher, DeepSpeed's among them and those of autograd's
backward, whatever thread it runs in; so a dispatch mode sees them all. Training itself does not import this.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megacode.parallel.mesh import Mesh

OPERATORS = {
    "allreduce_": ("all-reduce", "tensors"),
    "allreduce_coalesced_": ("all-reduce", "tensors"),
    "_allgather_base_": ("all-gather", "input_tensor"),
    "allgather_": ("all-gather", "input_tensors"),
    "allgather_coalesced_": ("all-gather", "input_list"),
    "allgather_into_tensor_coalesced_": ("all-gather", "inputs"),
    "_reduce_scatter_base_": ("reduce-scatter", "input_tensor"),
    "reduce_scatter_": ("reduce-scatter", "input_tensors"),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", "inputs"),
    "alltoall_": ("all-to-all", "input_tensors"),
    "alltoall_base_": ("all-to-all", "input"),
    "broadcast_": ("broadcast", "tensors"),
    "reduce_": ("reduce", "tensors"),
    "gather_": ("gather", "input_tensors"),
    "scatter_": ("scatter", "input_tensors"),
    "send": ("send", "tensors"),
    "recv_": ("receive", "tensors"),
    "recv_any_source_": ("receive", "tensors"),
    "barrier": ("barrier", None),
    "monitored_barrier_": ("barrier", None),
}
"""Operator of the namespace c10d -> its kind, and the argument that holds what this rank gives (or receives)."""


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


class Traffic(TorchDispatchMode):
    """Notes every call while it is entered; those in groups of one rank are left out, since nothing travels."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.calls: list[Call] = []
        world = dist.group.WORLD
        assert world is not None
        self._axes = {
            world.group_name: "world",
            mesh.control_group.group_name: "world",
            **{group.group_name: "pipeline" for group in mesh.edges.values() if group is not world},
            mesh.model_group.group_name: "model",
            mesh.data_group.group_name: "data",
            mesh.context_group.group_name: "context",
            mesh.tensor_group.group_name: "tensor",
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func, args)
        assert func.namespace != "_c10d_functional", f"{func} is not counted"
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, args: Any) -> None:
        kind, given = OPERATORS[func.overloadpacket.__name__]
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        group = dist.ProcessGroup.unbox(named["process_group"])
        if group.size() == 1:
            return
        axis = "pipeline" if kind in ("send", "receive") else self._axes.get(group.group_name, "unknown")
        tensors = [leaf for leaf in tree_leaves(named.get(given)) if isinstance(leaf, Tensor)]
        elements = sum(tensor.numel() for tensor in tensors)
        self.calls.append(Call(axis, kind, elements, sum(tensor.nbytes for tensor in tensors)))


@dataclass(frozen=True)
class Total:
    """Calls of one axis and kind."""

    calls: int
    elements: int
    bytes: int


def totals(calls: Iterable[Call]) -> dict[tuple[str, str], Total]:
    """(axis, kind) -> its calls, elements and bytes."""
    counts: Counter[tuple[str, str]] = Counter()
    elements: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    for call in calls:
        key = call.axis, call.kind
        counts[key] += 1
        elements[key] += call.elements
        size[key] += call.bytes
    return {key: Total(counts[key], elements[key], size[key]) for key in counts}
