"""The grid of ranks and its process groups. A Mesh is passed to whoever needs it: there is no global state."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

SLOWEST_WRITER = timedelta(hours=2)
"""How long ranks wait for the one whose share of a checkpoint takes longest."""


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the grid [pipeline, data, context, tensor] (tensor fastest), and its groups.

    `data_group` is data x context: the ranks that ZeRO shards over and that gradients are summed over.
    """

    rank: int
    pipeline: int
    data: int
    context: int
    tensor: int
    pipeline_rank: int
    data_rank: int
    context_rank: int
    tensor_rank: int
    data_group: ProcessGroup
    context_group: ProcessGroup | None
    """The ranks that share a sequence; None where it is one rank's."""
    tensor_group: ProcessGroup | None
    """The ranks that share each layer; None where it is one rank's."""
    model_group: ProcessGroup
    """pipeline x tensor: the ranks that together hold one replica of the model."""
    control_group: ProcessGroup
    """All ranks, on gloo: for objects and barriers that must not wait for a device."""
    edges: dict[tuple[int, int], ProcessGroup]
    """(sending, receiving) global rank -> the group of transfers from one neighbour stage of this rank to the other.

    On NCCL a group is one queue, and two directions in one queue wait for each other: there, one group a direction.
    gloo has tags, and each of its groups costs polling threads: there it is the world."""

    @property
    def zero_rank(self) -> int:
        """Rank within `data_group`."""
        return self.data_rank * self.context + self.context_rank

    @property
    def zero_size(self) -> int:
        """Size of `data_group`."""
        return self.data * self.context

    def stage_rank(self, pipeline_rank: int) -> int:
        """The global rank at another pipeline rank and otherwise this rank's place."""
        place = self.data_rank * self.context + self.context_rank
        return ((pipeline_rank % self.pipeline) * self.data * self.context + place) * self.tensor + self.tensor_rank

    @property
    def mpu(self) -> "DeepSpeedView":
        """The mesh as DeepSpeed asks for it."""
        return DeepSpeedView(self)


def build_mesh(pipeline: int, data: int, tensor: int, context: int = 1, timeout_seconds: float = 600) -> Mesh:
    """Make the groups of all axes. Collective: every rank calls it, with the same sizes.

    NCCL makes a group's communicator at once, and all ranks wait for one another at each: groups that nothing is sent
    in are not made. DeepSpeed asks for those of data and model, of one rank too.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    assert pipeline * data * context * tensor == world, "the plan checks the world size before this"
    grid = torch.arange(world).view(pipeline, data, context, tensor)
    pp, dp, cp, tp = (int(index) for index in (grid == rank).nonzero()[0])
    timeout = timedelta(seconds=timeout_seconds)

    def group(order: tuple[int, ...], size: int) -> ProcessGroup:
        """Ranks of consecutive `size` in the permuted grid; every rank creates every group, in the same order."""
        mine = None
        for ranks in grid.permute(*order).reshape(-1, size).tolist():
            made = dist.new_group(ranks, timeout=timeout)
            if rank in ranks:
                mine = made
        assert mine is not None
        return mine

    gloo = dist.get_backend() == "gloo"
    everyone = dist.group.WORLD
    assert everyone is not None

    def edges() -> dict[tuple[int, int], ProcessGroup]:
        mine = {}
        for line in grid.permute(1, 2, 3, 0).reshape(-1, pipeline).tolist():
            pairs = {
                pair for a, b in zip(line, line[1:] + line[:1], strict=True) if a != b for pair in ((a, b), (b, a))
            }
            for pair in sorted(pairs):
                made = everyone if gloo else dist.new_group(list(pair), timeout=timeout)
                if rank in pair:
                    mine[pair] = made
        return mine

    return Mesh(
        rank, pipeline, data, context, tensor, pp, dp, cp, tp,
        data_group=group((0, 3, 1, 2), data * context),
        context_group=group((0, 1, 3, 2), context) if context > 1 else None,
        tensor_group=group((0, 1, 2, 3), tensor) if tensor > 1 else None,
        model_group=group((1, 2, 0, 3), pipeline * tensor),
        control_group=everyone if gloo else dist.new_group(backend="gloo", timeout=max(timeout, SLOWEST_WRITER)),
        edges=edges(),
    )  # fmt: skip


class DeepSpeedView:
    """The `mpu` that DeepSpeed is shown.

    Its model-parallel group is the whole pipeline x tensor block of a replica, so that norms and overflows cover the
    whole model; its data-parallel group is data x context. It has no sequence-parallel method on purpose: ZeRO-3 takes
    the data-parallel group for its partitions and would then reduce over too few ranks, without an error.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self._mesh.pipeline_rank * self._mesh.tensor + self._mesh.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.pipeline * self._mesh.tensor

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._mesh.model_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.zero_rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.zero_size

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._mesh.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._mesh.data_group)

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._mesh.pipeline_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._mesh.pipeline

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.tensor
