"""What accelerators and the links between them can do, per kind of device."""

from dataclasses import dataclass, replace

PEAK_TERAFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}
"""bf16 on the tensor cores, without sparsity, by a word in the device's name (NVIDIA's data sheets, SXM parts).

An H100 PCIe or a power-capped part does less: say `logging.peak_teraflops` in the recipe."""


def peak_teraflops(device_name: str) -> float | None:
    """Peak of a device by the name that CUDA gives it, or None where it is not known (a CPU, say)."""
    return next((peak for word, peak in PEAK_TERAFLOPS.items() if word in device_name), None)


@dataclass(frozen=True)
class Hardware:
    """A device and its links, as the estimate of a step's time sees them. Bandwidths are those that programs attain."""

    peak_teraflops: float
    """Dense bf16 matmul peak."""
    efficiency: float
    """Share of the peak that large matmuls attain in a step."""
    attention_efficiency: float
    """Share of the peak that attention kernels attain, of the operations that they do."""
    memory_gb_per_second: float
    """Device memory, reads and writes together."""
    link_gb_per_second: float
    """Within a node, one way per device: NCCL's bus bandwidth."""
    network_gb_per_second: float
    """Between nodes, one way per device."""
    host_gb_per_second: float
    """Between a device and its host's memory, one way."""
    memory_gib: float
    """Of the device, as CUDA reports it."""
    block_overhead_seconds: float = 0.6e-3
    """Launches and tails of one block's kernels, forward and backward of one micro-batch, whatever their size."""
    devices_per_node: int = 8


_A100 = Hardware(PEAK_TERAFLOPS["A100"], 0.78, 0.45, 1700, 230, 22, 22, 79)
_H100 = Hardware(PEAK_TERAFLOPS["H100"], 0.68, 0.42, 3000, 360, 45, 50, 79)

HARDWARE = {"A100": _A100, "H100": _H100, "H200": replace(_H100, memory_gb_per_second=4300, memory_gib=140)}
"""Measured by others: NCCL's bus bandwidth in a node of A100 and of H200, copies on H100 and H200 at nine tenths of the
data sheet's bandwidth. Fitted, once a generation, to the published step times of docs/plan.md: the efficiencies and the
overhead. H200 has H100's arithmetic."""
