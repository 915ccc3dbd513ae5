"""One step to plan: a model, how ranks share it, and the policies. Everything that memory and cost are functions of."""

from dataclasses import dataclass
from typing import Literal

from megacode.plan.layout import Layout
from megacode.plan.shape import Shape
from megacode.recipe import Recompute

Offload = Literal["none", "optimizer", "all"]
"""What lies in the host's memory: nothing, masters and moments, or parameters too."""


@dataclass(frozen=True)
class Job:
    """A training step; see `recipe_job` in memory.py for ours."""

    shape: Shape
    layout: Layout
    micro_samples: int
    zero: int = 1
    gather: Literal["step", "microbatch"] = "step"
    reduce: Literal["step", "microbatch"] = "step"
    recompute: Recompute = "none"
    sequence_parallel: bool = False
    offload: Offload = "none"
    bucket_elements: int = 50_000_000
    """DeepSpeed's reduce_bucket_size."""
    reduced_bytes: int | None = None
    """Bytes of a gradient's element on the wire, by DeepSpeed's communication_data_type; left out, the shape's."""
    overlap_comm: bool = False
    """DeepSpeed's overlap_comm: a second bucket (ZeRO-1, 2)."""
    contiguous_gradients: bool = True
    """DeepSpeed's contiguous_gradients: gradients are copied into a bucket of full size."""
    max_live_elements: int = 10**13
    """DeepSpeed's stage3_max_live_parameters: how much its prefetcher may gather ahead of use."""
    padded_rows: int | None = None
    """Rows of embedding and head on a tensor rank; left out, the vocabulary's equal share."""

    @property
    def micro_tokens(self) -> int:
        """Tokens of one micro-batch on one data rank."""
        return self.micro_samples * self.shape.sequence

    @property
    def local_tokens(self) -> int:
        """Tokens of one micro-batch on one context rank."""
        return self.micro_tokens // self.layout.context

    @property
    def tokens(self) -> int:
        """Tokens of one step, over all data ranks."""
        return self.micro_tokens * self.layout.num_micro_batches * self.layout.data

    @property
    def vocabulary_rows(self) -> int:
        """Rows of embedding and head that a tensor rank holds."""
        return self.padded_rows or -(-self.shape.vocabulary // self.layout.tensor)

    def chunk_layers(self, rank: int) -> list[int]:
        """Number of layers of each chunk of a pipeline rank."""
        return [len(stage) for stage in self.layout.stages[rank :: self.layout.pipeline]]

    def chunk_parameters(self, rank: int) -> list[int]:
        """Parameters of each chunk on one device of a pipeline rank, padding rows included."""
        block, tensor = self.shape.block, self.layout.tensor
        per_layer = block.matrix_parameters // tensor + block.replicated_parameters
        sizes = [layers * per_layer for layers in self.chunk_layers(rank)]
        first, last = rank == 0, rank == self.layout.pipeline - 1
        end = self.vocabulary_rows * self.shape.hidden
        if first:
            sizes[0] += end
        if last:
            sizes[-1] += self.shape.hidden + (0 if first and self.shape.tied else end)
        return sizes

    def parameters(self, rank: int) -> int:
        """Parameters of one device of a pipeline rank, padding rows included."""
        return sum(self.chunk_parameters(rank))
