"""What a step costs: bubble, collectives, bytes, seconds. Formulas and their sources: docs/plan.md.

A step's time is the slowest pipeline rank's work for all its micro-batches, plus the bubble, plus what data ranks
exchange without hiding it, plus the optimizer. A rank's work is matmuls and attention at a share of the peak,
memory-bound operations at the memory's bandwidth, and the exchanges among tensor and pipeline ranks that nothing hides.
"""

from dataclasses import dataclass, fields
from functools import cached_property

from megacode.plan import communication
from megacode.plan.communication import Exchange
from megacode.plan.hardware import Hardware
from megacode.plan.job import Job

OPTIMIZER_BYTES = 30
"""Per parameter of a rank's partition: fp32 gradient, master and two moments read, the last three and bf16 written."""


@dataclass(frozen=True)
class Seconds:
    """The parts of a step's time, on the slowest pipeline rank."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    """Operations bound by the memory's bandwidth."""
    overhead: float = 0.0
    """Launches and tails of kernels."""
    tensor: float = 0.0
    """Exchanges among tensor ranks."""
    context: float = 0.0
    """Exchanges among context ranks."""
    pipeline: float = 0.0
    """Waiting for hidden states of neighbour stages."""
    bubble: float = 0.0
    data: float = 0.0
    """Exchanges among data ranks that nothing hides."""
    optimizer: float = 0.0
    offload: float = 0.0
    """Transfers between device and host."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(*(getattr(self, f.name) * factor for f in fields(self)))


@dataclass(frozen=True)
class Cost:
    """What a step costs, by the pipeline rank that is slowest."""

    job: Job
    hardware: Hardware
    overlap: float = 0.0
    """Share of the tensor ranks' exchanges that computation hides; above 0, data ranks' are hidden as far as a
    micro-batch's computation lasts. Nothing is hidden in ours: tensor ranks wait, and published step times of ZeRO-3
    show less hiding than none (docs/plan.md)."""

    @cached_property
    def _work(self) -> list[tuple[Seconds, Seconds]]:
        """(forward, backward) of one micro-batch, for each pipeline rank, over its chunks."""
        passes: dict[tuple[int, bool, bool], tuple[Seconds, Seconds]] = {}
        found = []
        for rank in range(self.job.layout.pipeline):
            key = sum(self.job.chunk_layers(rank)), rank == 0, rank == self.job.layout.pipeline - 1
            if key not in passes:
                passes[key] = self._pass(rank, False), self._pass(rank, True)
            found.append(passes[key])
        return found

    @cached_property
    def slowest(self) -> int:
        """The pipeline rank whose micro-batch takes longest."""
        totals = [(forward + backward).total for forward, backward in self._work]
        return totals.index(max(totals))

    @cached_property
    def seconds(self) -> Seconds:
        """The step's time and its parts."""
        forward, backward = self._work[self.slowest]
        work = (forward + backward) * self.job.layout.num_micro_batches
        parameters = max(self.job.parameters(rank) for rank in range(self.job.layout.pipeline))
        share = parameters / self.job.layout.zero_size
        step = share * OPTIMIZER_BYTES / self._memory
        host = 0.0
        if self.job.offload != "none":  # gradients out, parameters back; Adam at a tenth of the device's bandwidth
            host, step = (
                share * (4 + self.job.shape.element_bytes) / (self.hardware.host_gb_per_second * 1e9),
                step * 10,
            )
        return work + Seconds(bubble=self._bubble_seconds, data=self._data_seconds, optimizer=step, offload=host)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the whole step per second, over all devices."""
        return self.job.tokens / self.seconds.total

    @property
    def bubble(self) -> float:
        """Idle share of the step."""
        return self._bubble_seconds / self.seconds.total

    @cached_property
    def _bubble_seconds(self) -> float:
        """Fill and drain: one micro-batch through all other ranks, shortened by interleaving (SC21, section 2.2)."""
        totals = [(forward + backward).total for forward, backward in self._work]
        return (sum(totals) - totals[self.slowest]) / self.job.layout.virtual_stages

    @property
    def _memory(self) -> float:
        return self.hardware.memory_gb_per_second * 1e9

    def _pass(self, rank: int, backward: bool) -> Seconds:
        """Forward, or backward with what it recomputes, of one micro-batch through a rank's chunks."""
        job, layers = self.job, sum(self.job.chunk_layers(rank))
        shape, layout, tokens = job.shape, job.layout, job.local_tokens
        block = self._layer_seconds("backward" if backward else "forward")
        if backward and job.recompute == "full":
            block += self._layer_seconds("again")
        total = block * layers
        first, last = rank == 0, rank == layout.pipeline - 1
        rows = shape.vocabulary / layout.tensor
        if last:
            flops = 2 * tokens * rows * shape.hidden * (2 if backward else 1)
            traffic = tokens * rows * self._loss_bytes(backward)
            total += Seconds(matmul=flops / self._matmul_speed, memory=traffic / self._memory)
        total += self._tensor_seconds(communication.end_exchanges(job, first, last, backward))
        if backward:
            total += Seconds(memory=job.parameters(rank) * self._accumulate_bytes / self._memory)
        return total + Seconds(pipeline=self._transfer_seconds() * layout.virtual_stages)

    def _loss_bytes(self, backward: bool) -> int:
        """Per logit: what the loss reads and writes."""
        w = self.job.shape.element_bytes
        if self.job.shape.megatron:
            return 20 + 2 * w  # logits and their fp32 copies: written, normalised, read
        if backward:
            return 0  # forward has left the gradient in the logits
        return 2 * w if self.job.layout.tensor == 1 else 3 * w  # among ranks the sums come before any gradient

    @property
    def _accumulate_bytes(self) -> int:
        """Per parameter and micro-batch: to add a gradient to a sum, or to copy it through DeepSpeed's bucket."""
        if self.job.shape.megatron:
            return 8  # fp32 sum read and written within the matmul
        if self.job.reduce == "microbatch":
            return 4 * self.job.shape.element_bytes
        return 10 if self.job.shape.element_bytes == 2 else 12

    @property
    def _matmul_speed(self) -> float:
        return self.hardware.peak_teraflops * 1e12 * self.hardware.efficiency

    def _layer_seconds(self, direction: communication.Pass) -> Seconds:
        job, block, tensor = self.job, self.job.shape.block, self.job.layout.tensor
        backward = direction == "backward"
        selective = backward and job.recompute == "selective"
        tokens = job.local_tokens
        flops = 2 * tokens * block.matrix_parameters * (2 if backward else 1)
        attention = tokens * block.attention_flops * (block.attention_backward if backward else 1)
        if selective and block.attention_again:
            attention += tokens * block.attention_flops
        traffic = 0.0
        for item in block.traffic:
            moved = (item.backward if backward else item.forward) + (
                item.forward if selective and item.selective else 0
            )
            traffic += moved / (tensor if item.split or job.sequence_parallel else 1)
        speed = self.hardware.peak_teraflops * 1e12 * self.hardware.attention_efficiency
        computed = Seconds(
            matmul=flops / tensor / self._matmul_speed,
            attention=attention / tensor / speed,
            memory=tokens * traffic / self._memory,
            overhead=self.hardware.block_overhead_seconds * (2 if backward else 1) / 3,
        )
        context = communication.sent_bytes(communication.context_exchanges(job, direction))
        gathered = Seconds(context=context / self._bus(job.layout.context, tensor))
        return computed + gathered + self._tensor_seconds(communication.layer_exchanges(job, direction))

    def _tensor_seconds(self, exchanges: list[Exchange]) -> Seconds:
        """What nothing hides of exchanges among tensor ranks, which are neighbours."""
        bus = self._bus(self.job.layout.tensor, 1)
        return Seconds(tensor=communication.sent_bytes(exchanges) / bus * (1 - self.overlap))

    def _bus(self, size: int, stride: int) -> float:
        """Bytes per second of a ring over `size` ranks, `stride` devices apart: links, or the cards it can use."""
        hardware = self.hardware
        if size * stride <= hardware.devices_per_node:
            return hardware.link_gb_per_second * 1e9
        inside = max(1, hardware.devices_per_node // stride)
        return min(hardware.link_gb_per_second, inside * hardware.network_gb_per_second) * 1e9

    def _transfer_seconds(self) -> float:
        """Of one hidden state to the neighbour stage: pipeline ranks are the farthest apart of all."""
        layout, hardware = self.job.layout, self.hardware
        if layout.pipeline == 1:
            return 0.0
        near = layout.world_size <= hardware.devices_per_node
        speed = hardware.link_gb_per_second if near else hardware.network_gb_per_second
        return communication.boundary_bytes(self.job) / (speed * 1e9)

    @cached_property
    def _data_seconds(self) -> float:
        """What data ranks exchange and nothing hides."""
        job, layout = self.job, self.job.layout
        if layout.zero_size == 1:
            return 0.0
        rank = max(range(layout.pipeline), key=job.parameters)
        bus = self._bus(layout.zero_size, layout.tensor)
        reduction = communication.reduction(job, rank).sent_bytes / bus
        gather = communication.gather(job, rank).sent_bytes / bus
        forward, backward = (part.total for part in self._work[rank])
        batches = layout.num_micro_batches
        times = 1 if job.reduce == "step" else batches
        seconds = times * self._exposed(reduction / times, backward)
        if job.zero == 3 and job.gather == "microbatch":
            each = gather / (2 * batches)
            return seconds + batches * (self._exposed(each, forward) + self._exposed(each, backward))
        return seconds + self._exposed(gather, forward)

    def _exposed(self, exchange: float, computation: float) -> float:
        return max(0.0, exchange - computation) if self.overlap else exchange
