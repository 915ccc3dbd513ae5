"""`Layers` for tensor and sequence parallelism: column, row and vocabulary-parallel layers and loss.

In shapes, `sequence` is what a context rank holds of each sequence, and `stream` this rank's part of it under sequence
parallelism, else the same.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megacode.kernels.dispatch import Choice
from megacode.model.layers import Embedding, Linear, PlainLayers, Slice, part_of
from megacode.model.linear import Exchange, linears
from megacode.parallel.collectives import Replicated, SplitSequence, sum_over_tensor_ranks
from megacode.parallel.heartbeat import communicating
from megacode.parallel.mesh import Mesh
from megacode.plan.layout import vocabulary_rows
from megacode.recipe import Recompute


class RowLinear(Linear):
    """A linear map whose inputs are split: partial products, summed over the tensor ranks."""

    def __init__(self, local_out: int, local_in: int, part: Slice, group: ProcessGroup, split_sequence: bool) -> None:
        super().__init__(local_out, local_in, part)
        self.group, self.split_sequence = group, split_sequence

    def forward(self, *inputs: Tensor, first: Callable[..., Tensor] | None = None) -> Tensor:
        """[batch, sequence, this rank's inputs] -> [batch, stream, out]"""
        return sum_over_tensor_ranks(super().forward(*inputs, first=first), self.group, self.split_sequence)


class VocabularyEmbedding(Embedding):
    """An embedding whose rows are split: tokens of other ranks give zeros, then the sum over the tensor ranks."""

    def __init__(self, rows: int, hidden: int, part: Slice, group: ProcessGroup, split_sequence: bool) -> None:
        super().__init__(rows, hidden, part)
        self.group, self.split_sequence = group, split_sequence

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, sequence] -> [batch, stream, hidden]"""
        part = part_of(self.weight)
        foreign = (tokens < part.start) | (tokens >= part.stop)
        rows = F.embedding((tokens - part.start).masked_fill(foreign, 0), self.weight)
        return sum_over_tensor_ranks(rows.masked_fill(foreign.unsqueeze(-1), 0.0), self.group, self.split_sequence)


class VocabularyHead(Linear):
    """The head whose rows are split and padded; `TensorLayers` drops the logits of padding."""

    def __init__(self, local_out: int, local_in: int, part: Slice, exchange: Exchange) -> None:
        super().__init__(local_out, local_in, part)
        self.exchange = exchange

    def forward(self, *inputs: Tensor, first: Callable[..., Tensor] | None = None) -> Tensor:
        """[batch, stream, hidden] -> [batch, sequence, this rank's rows with padding]"""
        return linears((self.weight,), *inputs, first=first, exchange=self.exchange)[0]


class _TensorRanks:
    """The ranks that share a vocabulary, as the cross-entropy asks for them."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def maximum(self, x: Tensor) -> None:
        with communicating("all-reduce", "tensor"):
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)

    def sum(self, x: Tensor) -> None:
        with communicating("all-reduce", "tensor"):
            dist.all_reduce(x, group=self.group)


class TensorLayers(PlainLayers):
    """`Layers` that the ranks of `mesh.tensor_group` share.

    Norms are replicated. Without sequence parallelism their gradients come out equal on all ranks; with it each rank
    has that of its part of the sequence, and the engine sums them.
    """

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        recompute: Recompute = "none",
        split_sequence: bool = False,
        choices: Mapping[str, Choice] | None = None,
    ) -> None:
        super().__init__(device, dtype, recompute, choices)
        assert mesh.tensor_group is not None, "one tensor rank is PlainLayers"
        self.group, self.rank, self.ranks = mesh.tensor_group, mesh.tensor_rank, mesh.tensor
        self.split_sequence = split_sequence
        self.exchange = SplitSequence(self.group) if split_sequence else Replicated(self.group)
        self._head_start, self._head_columns = 0, 0

    def _split(self, size: int) -> tuple[int, int]:
        """(start, stop) of this rank's equal part."""
        assert size % self.ranks == 0, "the plan refuses what can't be split"
        local = size // self.ranks
        return self.rank * local, (self.rank + 1) * local

    def _rows(self, vocabulary: int) -> tuple[int, int, int]:
        """(rows with padding, start, stop) of this rank's part of the vocabulary."""
        rows = vocabulary_rows(vocabulary, self.ranks)
        return rows, self.rank * rows, min((self.rank + 1) * rows, vocabulary)

    def embedding(self, rows: int, hidden: int, std: float) -> nn.Module:
        padded, start, stop = self._rows(rows)
        part = Slice((rows, hidden), std, 0, start, stop)
        return VocabularyEmbedding(padded, hidden, part, self.group, self.split_sequence)

    def column(self, inputs: int, outputs: int, std: float) -> Linear:
        start, stop = self._split(outputs)
        return Linear(stop - start, inputs, Slice((outputs, inputs), std, 0, start, stop))

    def row(self, inputs: int, outputs: int, std: float) -> Linear:
        start, stop = self._split(inputs)
        part = Slice((outputs, inputs), std, 1, start, stop)
        return RowLinear(outputs, stop - start, part, self.group, self.split_sequence)

    def head(self, hidden: int, rows: int, std: float) -> nn.Module:
        padded, start, stop = self._rows(rows)
        self._head_start, self._head_columns = start, stop - start
        return VocabularyHead(padded, hidden, Slice((rows, hidden), std, 0, start, stop), self.exchange)

    def logits(self, padded: Tensor) -> Tensor:
        return padded[..., : self._head_columns]

    def loss(self, padded: Tensor, labels: Tensor, scale: Tensor | None) -> Tensor:
        part = self._head_start, _TensorRanks(self.group), scale, self._head_columns
        return self.cross_entropy(padded.flatten(0, 1), labels.flatten(), *part).view(labels.shape)
