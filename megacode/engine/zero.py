"""One plain DeepSpeedEngine per pipeline rank, holding all of that rank's chunks, under our own schedule.

DeepSpeed's PipelineEngine refuses ZeRO-2 and 3. A plain engine does not know that it is one stage of several; what that
needs is in `private`, one function a cure.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import Tensor

from megacode.engine import private
from megacode.engine.config import deepspeed_config
from megacode.engine.gather import Gatherer, Piece
from megacode.engine.optimizer import OPERATION, choose, make
from megacode.importing import uncollected
from megacode.model.layers import part_of
from megacode.model.llama import Block
from megacode.parallel.build import build_chunks, choose_kernels
from megacode.parallel.heartbeat import communicating, doing, finishing
from megacode.parallel.mesh import Mesh
from megacode.parallel.pipeline import MicroBatch, Pipeline
from megacode.plan.layout import Layout
from megacode.recipe import Recipe

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


check_version = private.check_version
local_shape = private.local_shape


def check_config(recipe: Recipe, device: torch.device) -> None:
    """Refuse a DeepSpeed file, or a backend of kernels or optimizer, that no engine could be made with on the device.

    Raises:
        UserError: names the file and the key, or the backend and what it lacks.
    """
    choose_kernels(recipe, device, DTYPES[recipe.precision])
    choose(recipe, device)
    private.check_config(deepspeed_config(recipe), recipe.deepspeed_config)


def start_deepspeed() -> None:
    """Let DeepSpeed find the initialised torch.distributed. Once a process, before any engine."""
    # DeepSpeed calls collectives by names that torch has renamed; its users can't mend that.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    private.skip_shared_memory_op()
    private.skip_device_count()
    private.expect_segments()
    with uncollected():
        importlib.import_module("torch._dynamo")  # torch's optimizers and DeepSpeed import it at their first use
        private.import_muon_plainly()
    deepspeed.init_distributed(verbose=False)


class ZeroEngine:
    """This rank's chunks with their optimizer: forward and backward of a step, its update, and access by name."""

    def __init__(self, recipe: Recipe, layout: Layout, mesh: Mesh, device: torch.device, num_groups: int = 1) -> None:
        dtype = DTYPES[recipe.precision]
        parallel, config = recipe.parallel, deepspeed_config(recipe)
        private.mark_collectives(mesh)
        doing("building the model")
        with _construction(parallel.zero, mesh, device, dtype, config):
            chunks = build_chunks(recipe, layout, mesh, device, dtype)
        self.parameters = dict(chunks.global_parameters())
        for parameter in self.parameters.values():
            private.mark_norm_owner(parameter, part_of(parameter).dim is not None or mesh.tensor_rank == 0)
        private.check_traces_within(mesh.data_group)
        private.gather_whole(chunks, Block)
        optimizer, choice = make(recipe, self.parameters.values(), device)
        choices = {**chunks.choices, OPERATION: choice}
        self.backends = {operation: choice.name for operation, choice in choices.items()}
        self.reasons = {operation: choice.reason for operation, choice in choices.items()}
        doing("building the engine")
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=chunks, optimizer=optimizer, config=config, mpu=mesh.mpu
        )
        private.create_adam_state(self.zero, step=0)
        private.mark_communication(self.zero)
        self._skip = private.DeviceSkip(self.zero)
        self.zero3, self.reduce_once = parallel.zero == 3, parallel.reduce_policy == "step"
        self.clear_partitions = self.zero3 and not self.reduce_once and layout.virtual_stages > 1
        self._release_leftovers: Callable[[], None] = lambda: None
        if self.zero3:
            private.own_the_trace(self.zero)
            if parallel.gather_policy == "step":
                self._release_leftovers = private.keep_leftovers(self.zero)
        accumulate = self.reduce_once and recipe.precision == "bf16"
        self._fp32_gradients = private.Fp32Gradients(self.parameters.values()) if accumulate else None
        # Under sequence parallelism each tensor rank has the gradients of its part of the sequence.
        self._partial = [p for p in self.parameters.values() if parallel.sequence and part_of(p).dim is None]
        self._tensor_group = mesh.tensor_group
        split = mesh.tensor if parallel.sequence else 1
        self._gatherer = Gatherer(self.parameters, mesh, device)
        self.pipeline = Pipeline(mesh, layout.virtual_stages, recipe.model.hidden, dtype, device, num_groups, split)

    def train_step(self, batches: list[MicroBatch], loss_scale: Tensor | float) -> Tensor:
        """Forward and backward of a step's micro-batches; gradients are reduced over the data ranks, not yet applied.

        Args:
            batches: this data rank's micro-batches, of a context rank its part of each.
            loss_scale: multiplies the summed negative log-likelihood before backward. DeepSpeed averages gradients over
                data x context ranks, so for the mean over the step's valid tokens it is their number / valid tokens.

        Returns:
            [num_groups] unscaled sums of the negative log-likelihoods of this data rank; zero on ranks without the last
            stage.
        """
        with self._step():
            scale = torch.as_tensor(loss_scale, dtype=torch.float32, device=self.pipeline.device)
            forward = partial(self._forward, loss_scale=scale)
            return self.pipeline.train(batches, scale, forward, self._backward)

    def evaluate(self, batches: list[MicroBatch]) -> Tensor:
        """[num_groups] sums of the micro-batches' negative log-likelihoods; zero on ranks without the last stage."""
        with private.validation_trace(self.zero) if self.zero3 else nullcontext():
            return self.pipeline.evaluate(batches, self._forward)

    def update(self, learning_rate: float, loss: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Clip and apply the optimizer's step; leave it out where the gradient norm or the loss is not finite.

        Args:
            learning_rate: of this step.
            loss: scalar, the same on every rank.

        Returns:
            The gradient norm over the whole model before clipping (inf where it is not finite), and 1 where the update
            was left out, else 0: scalars on the device. No host synchronisation, unless the optimizer is offloaded.
        """
        for group in self.zero.optimizer.param_groups:
            group["lr"] = learning_rate
        self._skip.loss = torch.zeros(()) if loss is None else loss
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        device = self.pipeline.device  # offloaded, both are on the host
        return self.engine.get_global_grad_norm().to(device), self._skip.skipped.to(device)

    def _forward(
        self, chunk: int, x: Tensor, batch: MicroBatch, last_stage: bool, loss_scale: Tensor | None = None
    ) -> Tensor:
        labels = batch.labels if last_stage else None
        return self.engine(chunk, x, batch.positions, batch.segments, labels, loss_scale)

    def _backward(self, scalar: Tensor, last: bool) -> None:
        if not self.reduce_once:
            self.engine.set_gradient_accumulation_boundary(last)
        private.start_backward(self.zero)
        self.engine.backward(scalar)

    @contextmanager
    def _step(self) -> Iterator[None]:
        if self.zero3:
            private.start_trace(self.zero)
            if self.clear_partitions:
                private.clear_partitions(self.zero)
        with ExitStack() as stack:
            if self.reduce_once:
                stack.enter_context(self.engine.coalesce_grad_reduction())
            yield
            if self._fp32_gradients is not None:
                self._fp32_gradients.hand_over()
            doing("reducing gradients")
            with finishing("reduction", "data"):
                stack.close()
        if self._tensor_group is not None and self._partial:
            # The sum over the data ranks and that over the tensor ranks commute: this way round it is once a step.
            with communicating("all-reduce", "tensor"):
                private.sum_gradients(self._partial, self._tensor_group)
        self._release_leftovers()

    def set_optimizer_step(self, step: int) -> None:
        """Set Adam's step count and empty its moments."""
        private.create_adam_state(self.zero, step)

    @property
    def optimizer_step(self) -> int:
        """Adam's step count: steps that were applied."""
        return private.adam_step(self.zero)

    @torch.no_grad()
    def write(self, name: str, value: Tensor, key: str = "weight", first_row: int = 0) -> None:
        """Set a parameter (key "weight") or an Adam state ("exp_avg", "exp_avg_sq").

        Args:
            name: the parameter's global name, one of `parameters`.
            value: this tensor rank's part of it, fp32, without padding (padding becomes zero); or at least its `rows`.
            key: what is set.
            first_row: of the part, that `value` begins with.
        """
        parameter = self.parameters[name]
        local = torch.zeros(local_shape(parameter), dtype=torch.float32, device=value.device)
        part_of(parameter).strip(local).narrow(0, first_row, len(value)).copy_(value)
        private.write(parameter, local, key)

    def rows(self, name: str, key: str = "weight") -> range:
        """The rows of this tensor rank's part of a parameter or of an Adam state that `write` uses here.

        Where this data rank has nothing but padding, that is the last row: the padding has to be written.
        """
        parameter = self.parameters[name]
        shape, (start, stop) = local_shape(parameter), private.span(parameter, key)
        width, count = shape[1:].numel(), len(part_of(parameter).strip(torch.empty(shape, device="meta")))
        return range(min(start // width, count - 1), min(-(-stop // width), count)) if start < stop else range(0)

    @torch.no_grad()
    def read(self, name: str, key: str = "weight") -> Tensor:
        """This tensor rank's part of a parameter, an Adam state or (key "gradient") the reduced gradient; no padding.

        Collective over the data ranks; the gradient is there between `train_step` and `update`.
        """
        parameter = self.parameters[name]
        value = private.read_gradient(parameter) if key == "gradient" else private.read(parameter, key)
        return part_of(parameter).strip(value)

    def keepers(self) -> dict[str, int]:
        """The data rank that keeps each parameter in a checkpoint; see `Gatherer.keepers`."""
        return self._gatherer.keepers()

    def gather(self, pieces: Sequence[Piece]) -> None:
        """Copy parameters and Adam states, each to the one data rank that keeps it; see `Gatherer.gather`."""
        self._gatherer.gather(pieces)


@contextmanager
def _construction(
    zero: int, mesh: Mesh, device: torch.device, dtype: torch.dtype, config: dict[str, Any]
) -> Iterator[None]:
    """Build modules on the device in the model's dtype; under ZeRO-3 each parameter is sharded as soon as it exists.

    zero.Init's default group is the world: parameters of different stages would be mixed. Its dtype argument means bf16
    on a CPU whatever one passes; left out, the configuration decides.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    init = deepspeed.zero.Init(
        data_parallel_group=mesh.data_group, config_dict_or_path=config, mpu=mesh.mpu, enabled=zero == 3
    )
    try:
        with torch.device(device), init:
            yield
    finally:
        torch.set_default_dtype(before)
