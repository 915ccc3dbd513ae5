"""What a rank keeps of a checkpoint comes from the data ranks that ZeRO has spread it over, straight to the host.

DeepSpeed's own calls give every data rank the whole of every tensor, though one keeps it: by an all-reduce of zeros
and shares under ZeRO-1 and 2. Here each share goes to the one rank that keeps the tensor, as many tensors at a time as
there are data ranks, so that all send and receive.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megacode.engine import private
from megacode.model.layers import part_of
from megacode.parallel.heartbeat import awaiting_device, communicating, doing
from megacode.parallel.mesh import Mesh

Piece = tuple[str, str, int, Tensor | None]
"""Global name, "weight" or an Adam state, the data rank that keeps it, and there where it goes."""


class Gatherer:
    """Brings parameters and Adam states of this stage to the data ranks that keep them.

    Args:
        parameters: this rank's by global name, in the order in which all data ranks hold them.
        mesh: the ranks.
        device: of the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], mesh: Mesh, device: torch.device) -> None:
        self.parameters, self.mesh, self.device = parameters, mesh, device
        self._ranks = dist.get_process_group_ranks(mesh.data_group)
        self._spans: dict[str, list[tuple[int, int]]] = {}
        """Of each parameter, which part of its flattened values each data rank has, padding left out."""

    @torch.no_grad()
    def gather(self, pieces: Sequence[Piece]) -> None:
        """Copy tensors, each to the data rank that keeps it. Collective over the data ranks; returns when all is there.

        Args:
            pieces: the same on all data ranks but for where they go: a contiguous fp32 tensor on the host, of the shape
                of this tensor rank's part without padding, at the keeper; None elsewhere.
        """
        if not self._spans:
            self._spans = self._exchange_spans()
        landing = _Landing(pieces, self.device)
        for some in _rounds(pieces, self.mesh.zero_size):
            doing(f"copying {some[0][0]} for a checkpoint", patient=True)
            with landing.next(some) as target:
                self._exchange(some, target)
        landing.finish()

    def _exchange_spans(self) -> dict[str, list[tuple[int, int]]]:
        mine = {}
        for name, parameter in self.parameters.items():
            start, share = private.share(parameter)
            size = _num_values(parameter)
            mine[name] = (min(start, size), min(start + share.numel(), size))
        spans: list[dict[str, tuple[int, int]]] = [{} for _ in self._ranks]
        with communicating("all-gather", "data"):
            dist.all_gather_object(spans, mine, group=self.mesh.data_group)
        return {name: [each[name] for each in spans] for name in mine}

    def _exchange(self, pieces: Sequence[Piece], target: Tensor | None) -> None:
        """Send this rank's shares of some tensors, and receive the others' of the one that it keeps."""
        mine, transfers = self.mesh.zero_rank, []
        for name, key, keeper, into in pieces:
            spans = self._spans[name]
            low, high = spans[mine]
            share = private.share(self.parameters[name], key)[1][: high - low]
            if into is None:
                if low < high:
                    transfers.append(dist.P2POp(dist.isend, share, self._ranks[keeper], self.mesh.data_group))
                continue
            assert target is not None
            target[low:high].copy_(share)
            transfers += [
                dist.P2POp(dist.irecv, target[start:stop], self._ranks[rank], self.mesh.data_group)
                for rank, (start, stop) in enumerate(spans)
                if rank != mine and start < stop
            ]
        if self.mesh.zero_size == 1:
            return
        with communicating("gather", "data"):  # those without a transfer too: what a rank has entered is compared
            for work in dist.batch_isend_irecv(transfers) if transfers else ():
                work.wait()


def _num_values(parameter: nn.Parameter) -> int:
    """Of this rank's part without padding. Padding is rows at the end, so it is the end of the flattened part too."""
    part, local = part_of(parameter), torch.empty(private.local_shape(parameter), device="meta")
    assert part.dim in (None, 0) or part.strip(local).numel() == local.numel(), "only rows are padded"
    return part.strip(local).numel()


def _rounds(pieces: Sequence[Piece], size: int) -> Iterator[Sequence[Piece]]:
    """Pieces in runs in which no data rank keeps more than one: some parameters' weights, then each of their states."""
    group: list[list[Piece]] = []
    for _, each in groupby(pieces, key=lambda piece: piece[0]):
        of_name = list(each)
        if len(group) == size or any(other[0][2] == of_name[0][2] for other in group):
            yield from zip(*group, strict=True)
            group = []
        group.append(of_name)
    yield from zip(*group, strict=True)


class _Landing:
    """Where tensors are received: on the host in their place; on a GPU in one of two buffers, each of the size of the
    largest, which a stream of its own copies to the host while the other is filled.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        self._device = device
        self._turn = 0
        if device.type == "cuda":
            largest = max((into.numel() for *_, into in pieces if into is not None), default=0)
            self._buffers = [torch.empty(largest, device=device) for _ in range(2)]
            self._copied: list[torch.cuda.Event | None] = [None, None]
            self._stream = torch.cuda.Stream(device)

    @contextmanager
    def next(self, pieces: Sequence[Piece]) -> Iterator[Tensor | None]:
        """The flat tensor to fill, within, with what this rank keeps of the pieces; None where it keeps none."""
        into = next((into.view(-1) for *_, into in pieces if into is not None), None)
        if into is None or self._device.type != "cuda":
            yield into
            return
        turn = self._turn = 1 - self._turn
        buffer, copied, current = self._buffers[turn][: into.numel()], self._copied[turn], torch.cuda.current_stream()
        if copied is not None:
            current.wait_event(copied)
        yield buffer
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            into.copy_(buffer, non_blocking=True)
            self._copied[turn] = self._stream.record_event()

    def finish(self) -> None:
        """Wait for what is still being copied."""
        if self._device.type == "cuda":
            with awaiting_device():
                self._stream.synchronize()
