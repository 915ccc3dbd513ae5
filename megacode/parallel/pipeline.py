"""Runs a schedule: receives, forward or backward, sends."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megacode.kernels.attention import Segments
from megacode.kernels.attention import to_device as to_device
from megacode.parallel.heartbeat import communicating, doing
from megacode.parallel.mesh import Mesh
from megacode.parallel.phases import measure
from megacode.parallel.schedule import Operation, forwards_only, one_f_one_b


@dataclass(frozen=True)
class MicroBatch:
    """What one forward needs, on this rank's device. Every stage reads it itself: only hidden states travel.

    `sequence` is the whole one, or what a context rank holds of it; tensor ranks hold the same.
    """

    tokens: Tensor
    """[batch, sequence] int64"""
    labels: Tensor
    """[batch, sequence] int64, IGNORE where there is no loss"""
    positions: Tensor
    """[batch, sequence] int64, in the document or in the whole sequence"""
    segments: Segments | None
    """The packed documents; None: each sequence is one segment. Context ranks have those of their queries and of all
    keys that these meet, with or without document masks (`context.own_part`)."""
    groups: Tensor | None = None
    """[batch, sequence] int64: the group in which a label's loss counts; None: all in group 0"""

    @staticmethod
    def whole(
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        bounds: Sequence[int] | None = None,
        groups: Tensor | None = None,
    ) -> "MicroBatch":
        """Whole sequences, on the host; `bounds` are those of documents over the flattened tokens, None: no masks."""
        return MicroBatch(tokens, labels, positions, None if bounds is None else Segments.between(bounds), groups)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: to_device(value, device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **tensors, segments=self.segments and self.segments.to(device))


Forward = Callable[[int, Tensor, MicroBatch, bool], Tensor]
"""(chunk, input, micro-batch, whether it is the last stage) -> hidden states, or the last stage's losses of labels."""
Backward = Callable[[Tensor, bool], None]
"""(scalar, whether it is the step's last backward): runs backward from the scalar."""


class _Seed(torch.autograd.Function):
    """A scalar whose gradient with respect to `y` is exactly `grad`: engines run backward from scalars only."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, y: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return torch.zeros((), dtype=torch.float32, device=y.device)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, one: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad, None


class _Sends:
    """What has been sent and may still be on its way: the tensors must live until it is there.

    Nobody asks the backend (gloo would not say): a neighbour that sends the result of an operation has received what
    that operation and all before it take, and its list of operations is known. So a send is let go of as soon as
    something comes back that the neighbour did not do before.
    """

    def __init__(self, mesh: Mesh, num_micro_batches: int, virtual_stages: int, backwards: bool) -> None:
        self.mesh = mesh
        self._positions: dict[int, dict[Operation, int]] = {}
        for rank in {(mesh.pipeline_rank + step) % mesh.pipeline for step in (-1, 1)}:
            done = (
                one_f_one_b(mesh.pipeline, rank, num_micro_batches, virtual_stages)
                if backwards
                else forwards_only(mesh.pipeline, num_micro_batches, virtual_stages)
            )
            self._positions[rank] = {operation: number for number, operation in enumerate(done)}
        self._pending: dict[int, deque[tuple[int, dist.Work, Tensor]]] = {rank: deque() for rank in self._positions}

    def _neighbour(self, operation: Operation, step: int) -> tuple[int, int]:
        """(pipeline rank, number in its list) of the same micro-batch's operation, `step` stages further."""
        stage = operation.chunk * self.mesh.pipeline + self.mesh.pipeline_rank + step
        chunk, rank = divmod(stage, self.mesh.pipeline)
        return rank, self._positions[rank][Operation(operation.kind, chunk, operation.micro_batch)]

    def add(self, operation: Operation, work: dist.Work, tensor: Tensor) -> None:
        """The result of an operation has been sent."""
        rank, number = self._neighbour(operation, 1 if operation.kind == "forward" else -1)
        self._pending[rank].append((number, work, tensor))

    def received(self, operation: Operation) -> None:
        """What an operation takes has come."""
        rank, done = self._neighbour(operation, -1 if operation.kind == "forward" else 1)
        pending = self._pending[rank]
        while pending and pending[0][0] <= done:
            pending.popleft()[1].wait()

    def wait(self) -> None:
        """Until all is there."""
        for rank, pending in self._pending.items():
            with communicating("send", peer=self.mesh.stage_rank(rank)):
                while pending:
                    pending.popleft()[1].wait()


class Pipeline:
    """Executes the schedule of this pipeline rank over its chunks."""

    def __init__(
        self,
        mesh: Mesh,
        virtual_stages: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        num_groups: int = 1,
        split_sequence: int = 1,
    ) -> None:
        """`split_sequence`: ranks that share the sequence of a hidden state between stages (sequence parallelism)."""
        self.split_sequence = split_sequence
        self.mesh, self.virtual_stages, self.num_groups = mesh, virtual_stages, num_groups
        self.hidden, self.dtype, self.device = hidden, dtype, device
        self.num_stages = mesh.pipeline * virtual_stages

    def train(
        self, batches: Sequence[MicroBatch], loss_scale: Tensor | float, forward: Forward, backward: Backward
    ) -> Tensor:
        """Forward and backward of all micro-batches of a step; backward starts from the loss times `loss_scale`.

        Returns:
            [num_groups] sums of the last stage's unscaled losses; zero on ranks without the last stage. No host
            synchronisation.
        """
        mesh = self.mesh
        operations = one_f_one_b(mesh.pipeline, mesh.pipeline_rank, len(batches), self.virtual_stages)
        return self._run(operations, batches, loss_scale, forward, backward)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], forward: Forward) -> Tensor:
        """Forwards of all micro-batches; returns as `train`."""

        def no_backward(scalar: Tensor, last: bool) -> None:
            raise AssertionError("a validation has no backward")

        operations = forwards_only(self.mesh.pipeline, len(batches), self.virtual_stages)
        return self._run(operations, batches, 1.0, forward, no_backward)

    def _stage(self, operation: Operation) -> int:
        return operation.chunk * self.mesh.pipeline + self.mesh.pipeline_rank

    def _run(
        self,
        operations: list[Operation],
        batches: Sequence[MicroBatch],
        loss_scale: Tensor | float,
        forward: Forward,
        backward: Backward,
    ) -> Tensor:
        held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        total = torch.zeros(self.num_groups, dtype=torch.float32, device=self.device)
        last_backward = max((i for i, o in enumerate(operations) if o.kind == "backward"), default=-1)
        keep_graph = last_backward >= 0
        sends = _Sends(self.mesh, len(batches), self.virtual_stages, backwards=keep_graph)
        received, work = self._exchange(None, operations[0], batches, sends)
        for number, operation in enumerate(operations):
            doing(f"{operation.kind} of chunk {operation.chunk}, micro-batch {operation.micro_batch}")
            if work is not None:
                with communicating("receive", peer=self._peer(-1 if operation.kind == "forward" else 1)):
                    work.wait()
                    sends.received(operation)
            stage, key = self._stage(operation), (operation.chunk, operation.micro_batch)
            batch = batches[operation.micro_batch]
            last_stage = stage == self.num_stages - 1
            send: Tensor | None = None
            if operation.kind == "forward":
                x = batch.tokens if received is None else received.requires_grad_(keep_graph)
                with measure("forward"):
                    y = forward(operation.chunk, x, batch, last_stage)
                if last_stage:
                    total += self._by_group(y.detach(), batch)
                else:
                    send = y.detach()
                if keep_graph:
                    held[key] = (x, y)
            else:
                x, y = held.pop(key)
                with measure("backward"):
                    scalar = y.sum() * loss_scale if received is None else _Seed.apply(y, received)
                    backward(scalar, number == last_backward)
                send = x.grad if stage > 0 else None
                del x, y, scalar  # their graph would hold what was received through the next forward
            following = operations[number + 1] if number + 1 < len(operations) else None
            received, work = self._exchange((operation, send) if send is not None else None, following, batches, sends)
        sends.wait()
        return total

    def _by_group(self, losses: Tensor, batch: MicroBatch) -> Tensor:
        """[num_groups] sums of the losses [batch, sequence]."""
        if batch.groups is None or self.num_groups == 1:
            return F.pad(losses.sum()[None], (0, self.num_groups - 1))
        members = F.one_hot(batch.groups.flatten(), self.num_groups).to(losses.dtype)
        return losses.flatten() @ members

    def _exchange(
        self,
        sent: tuple[Operation, Tensor] | None,
        following: Operation | None,
        batches: Sequence[MicroBatch],
        sends: _Sends,
    ) -> tuple[Tensor | None, dist.Work | None]:
        """Send one result and start receiving the next operation's input.

        Nothing here waits. Each direction between two ranks has a group of its own, and the schedules send and receive
        in it in the same order, which is what NCCL goes by; gloo goes by the tags.
        """
        if sent is not None:
            operation, tensor = sent
            step = 1 if operation.kind == "forward" else -1
            peer, tag = self._peer(step), self._tag(step, self._stage(operation) + step, operation, len(batches))
            tensor = tensor.contiguous()
            work = dist.isend(tensor, peer, group=self.mesh.edges[self.mesh.rank, peer], tag=tag)
            assert work is not None
            sends.add(operation, work, tensor)
        if following is None:
            return None, None
        stage, step = self._stage(following), 1 if following.kind == "forward" else -1
        if stage == (0 if step == 1 else self.num_stages - 1):
            return None, None
        batch, sequence = batches[following.micro_batch].tokens.shape
        received = torch.empty(
            batch, sequence // self.split_sequence, self.hidden, dtype=self.dtype, device=self.device
        )
        peer, tag = self._peer(-step), self._tag(step, stage, following, len(batches))
        return received, dist.irecv(received, peer, group=self.mesh.edges[peer, self.mesh.rank], tag=tag)

    def _peer(self, step: int) -> int:
        return self.mesh.stage_rank(self.mesh.pipeline_rank + step)

    def _tag(self, step: int, receiving_stage: int, operation: Operation, num_micro_batches: int) -> int:
        direction = 0 if step == 1 else 1
        return (direction * self.num_stages + receiving_stage) * num_micro_batches + operation.micro_batch
