"""What accelerators can do at most: vendors' figures for dense arithmetic."""

PEAK_TERAFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}
"""bf16 on the tensor cores, without sparsity, by a word in the device's name (NVIDIA's data sheets, SXM parts).

An H100 PCIe or a power-capped part does less: say `logging.peak_teraflops` in the recipe."""


def peak_teraflops(device_name: str) -> float | None:
    """Peak of a device by the name that CUDA gives it, or None where it is not known (a CPU, say)."""
    return next((peak for word, peak in PEAK_TERAFLOPS.items() if word in device_name), None)
