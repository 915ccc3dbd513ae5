"""Sleeps in a model's blocks, in place of the time that a large model's kernels would take."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megacode.engine.zero import ZeroEngine
    from megacode.model.linear import Exchange, Wait

KERNELS = 4
"""Equal parts of a block's forward: the maps to q, k and v; attention and its output; gate and up; down. In backward
each part counts twice, for the gradients of its input and of its weights."""


@dataclass
class Kernel:
    """Keeps a rank busy, but no core."""

    seconds: float = 0.0

    def __call__(self, times: int = 1) -> None:
        """Run so many times in a row."""
        if self.seconds:
            time.sleep(self.seconds * times)


class BusyExchange:
    """An exchange around linear maps that take time.

    As of real kernels, that of the input's gradient runs while the gathering of backward is under way, and that of the
    weights' gradients while the sum of the input's is.
    """

    def __init__(self, exchange: Exchange, kernel: Kernel) -> None:
        self.exchange, self.kernel = exchange, kernel

    def collect(self, x: Tensor) -> Wait:
        """What was collected is used at once: in forward by the maps, in backward for the weights' gradients."""
        wait = self.exchange.collect(x)

        def wait_and_compute() -> Tensor:
            whole = wait()
            self.kernel()
            return whole

        return wait_and_compute

    def spread(self, grad: Tensor) -> Wait:
        """The input's gradient has just been computed."""
        self.kernel()
        return self.exchange.spread(grad)


def make_busy(zero: ZeroEngine, kernel: Kernel) -> None:
    """Let each block of an engine run the kernel `KERNELS` times in a forward and twice as often in a backward."""
    from megacode.model.layers import PlainLayers
    from megacode.model.llama import Block

    def before(rows: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kernel()
        inputs[0].register_hook(lambda grad: kernel(2))  # runs in backward, when the maps' own has ended

    blocks = [module for module in zero.engine.module.modules() if isinstance(module, Block)]
    for block in blocks:
        for rows in (block.self_attn.o_proj, block.mlp.down_proj):
            rows.register_forward_pre_hook(before)
    layers = blocks[0].self_attn.layers  # one for all blocks
    assert isinstance(layers, PlainLayers)
    layers.exchange = BusyExchange(layers.exchange, kernel)
