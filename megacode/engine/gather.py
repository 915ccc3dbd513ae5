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

    def keepers(self) -> dict[str, int]:
        """The data rank that keeps each parameter: one that has most of it, of these the one that keeps least yet.

        So little is sent and all write about as much: under ZeRO-1 and 2 nearly every parameter lies on one rank, under
        ZeRO-3 all have as much of each, but for what does not divide. The order takes the largest of each rank, then
        the next of each, so that those that are copied together are alike. Collective over the data ranks.
        """
        self._exchange_spans()
        size = self.mesh.zero_size
        kept, turns = [0] * size, [0] * size
        found: list[tuple[int, int, str]] = []
        for name in sorted(self.parameters, key=self._size, reverse=True):
            have = [stop - start for start, stop in self._spans[name]]
            keeper = min((rank for rank in range(size) if max(have) - have[rank] < size), key=kept.__getitem__)
            found.append((turns[keeper], keeper, name))
            kept[keeper] += self._size(name)
            turns[keeper] += 1
        return {name: keeper for _, keeper, name in sorted(found)}

    @torch.no_grad()
    def gather(self, pieces: Sequence[Piece]) -> None:
        """Copy tensors, each to the data rank that keeps it. Collective over the data ranks; returns when all is there.

        Args:
            pieces: the same on all data ranks but for where they go: a contiguous fp32 tensor on the host, of the shape
                of this tensor rank's part without padding, at the keeper; None elsewhere.
        """
        self._exchange_spans()
        landing = _Landing(max((self._size(name) for name, *_ in pieces), default=0), self.device)
        for some in _rounds(pieces, self.mesh.zero_size):
            doing(f"copying {some[0][0]} for a checkpoint", patient=True)
            shares = [private.share(self.parameters[name], key)[1] for name, key, *_ in some]
            for stretch in landing.stretches(max(self._size(name) for name, *_ in some)):
                with landing.next(some, stretch) as target:
                    self._exchange(some, shares, stretch, target)
            del shares  # with an offloaded optimizer they are copies
        landing.finish()

    def _size(self, name: str) -> int:
        """Values of this tensor rank's part."""
        return max(stop for _, stop in self._spans[name])

    def _exchange_spans(self) -> None:
        if self._spans:
            return
        mine = {}
        for name, parameter in self.parameters.items():
            start, share = private.share(parameter)
            size = _num_values(parameter)
            mine[name] = (min(start, size), min(start + share.numel(), size))
        spans: list[dict[str, tuple[int, int]]] = [{} for _ in self._ranks]
        with communicating("all-gather", "data"):
            dist.all_gather_object(spans, mine, group=self.mesh.data_group)
        self._spans = {name: [each[name] for each in spans] for name in mine}

    def _exchange(
        self, pieces: Sequence[Piece], shares: Sequence[Tensor], stretch: range, target: Tensor | None
    ) -> None:
        """Send this rank's shares of a stretch of some tensors, and receive the others' of the one that it keeps."""
        mine, transfers = self.mesh.zero_rank, []
        for (name, _, keeper, into), share in zip(pieces, shares, strict=True):
            spans = [_common(each, stretch) for each in self._spans[name]]
            low, high = spans[mine]
            first = self._spans[name][mine][0]
            if into is None:
                if low < high:
                    part = share[low - first : high - first]
                    transfers.append(dist.P2POp(dist.isend, part, self._ranks[keeper], self.mesh.data_group))
                continue
            assert target is not None
            places = [slice(start - stretch.start, stop - stretch.start) for start, stop in spans]
            target[places[mine]].copy_(share[low - first : high - first])
            transfers += [
                dist.P2POp(dist.irecv, target[place], self._ranks[rank], self.mesh.data_group)
                for rank, place in enumerate(places)
                if rank != mine and place.start < place.stop
            ]
        if self.mesh.zero_size == 1:
            return
        with communicating("gather", "data"):  # those without a transfer too: what a rank has entered is compared
            for work in dist.batch_isend_irecv(transfers) if transfers else ():
                work.wait()


def _common(span: tuple[int, int], stretch: range) -> tuple[int, int]:
    """What both have; where that is nothing, an empty span at the stretch's beginning."""
    low, high = max(span[0], stretch.start), min(span[1], stretch.stop)
    return (low, high) if low < high else (stretch.start, stretch.start)


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
    """Where tensors are received: on the host in their place; on a GPU in one of two buffers, each of half the size of
    the largest, which a stream of its own copies to the host while the other is filled.
    """

    def __init__(self, largest: int, device: torch.device) -> None:
        self._device = device
        self._turn = 0
        if device.type == "cuda":
            self._half = max(1, -(-largest // 2))
            self._buffers = [torch.empty(self._half, device=device) for _ in range(2)]
            self._copied: list[torch.cuda.Event | None] = [None, None]
            self._stream = torch.cuda.Stream(device)

    def stretches(self, size: int) -> Iterator[range]:
        """The stretches of so many values that are received one after the other."""
        step = self._half if self._device.type == "cuda" else max(1, size)
        for start in range(0, size, step):
            yield range(start, min(start + step, size))

    @contextmanager
    def next(self, pieces: Sequence[Piece], stretch: range) -> Iterator[Tensor | None]:
        """The flat tensor to fill, within, with a stretch of what this rank keeps of the pieces; None where it keeps
        none."""
        into = next((into.view(-1)[stretch.start : stretch.stop] for *_, into in pieces if into is not None), None)
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
