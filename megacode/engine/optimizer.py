"""Which code makes AdamW's step: a table, a choice, an explanation, in the words of kernels/dispatch.py.

The step updates fp32 masters and moments (flat tensors, one a parameter group or ZeRO-3 sub-group) from fp32 gradients,
whatever the model's arithmetic. It is elementwise and bound by memory: 28 bytes a parameter, read or written once.
"""

import contextlib
import importlib
import io
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder
from deepspeed.ops.op_builder.builder import assert_no_cuda_mismatch
from torch import nn
from torch.optim import Optimizer
from torch.utils import cpp_extension

from megacode.engine.config import deepspeed_config, offloads_optimizer
from megacode.errors import UserError
from megacode.kernels import dispatch
from megacode.kernels.dispatch import Backend, Choice, Row, Table, Task, UnservableError
from megacode.kernels.packages import import_failure, nvidia_apex_available
from megacode.model.layers import part_of
from megacode.parallel.heartbeat import awaiting_device, doing
from megacode.recipe import OptimizerSection, Recipe

Groups = list[dict[str, Any]]
"""Parameter groups as torch's optimizers take them: `params`, `weight_decay`."""

OPERATION = "optimizer"


class _AsksHost(Optimizer):
    """Leaves the step out where `found_inf` is 1, as torch's fused AdamW does on the device by itself.

    The kernels of the others know no such flag, so the host asks, and waits for the device.
    """

    found_inf: torch.Tensor | None = None

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        if self.found_inf is not None:
            with awaiting_device():
                left_out = bool(self.found_inf)
            if left_out:
                return None
        return super().step(closure)


class _DeepSpeedFused(_AsksHost, FusedAdam):
    """DeepSpeed's, for masters on a GPU. It counts steps for each tensor."""


class _DeepSpeedCPU(_AsksHost, DeepSpeedCPUAdam):
    """DeepSpeed's, for masters in the host's memory. It counts steps for each tensor."""


class _StepPerTensor(Optimizer):
    """apex counts the calls of a group, and fails at one without tensors.

    ZeRO-3 has it update one tensor of a group after the other, the other groups being empty: bias correction would go
    on with each of them.
    """

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["params"]]
        try:
            for group in self.param_groups:
                group["step"] = int(self.state[group["params"][0]].get("step", 0))
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["step"] = group["step"]
        finally:
            self.param_groups = groups


def param_groups(parameters: Iterable[nn.Parameter], section: OptimizerSection) -> Groups:
    """The parameters in two groups: matrices, which decay, and norms, which do not."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if part_of(p).std > 0], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if part_of(p).std == 0], "weight_decay": 0.0},
    ]


def torch_adamw(groups: Groups, section: OptimizerSection, device: torch.device) -> Optimizer:
    """torch's fused AdamW: the fastest of torch's three on either device, and the only one that knows `found_inf`."""
    return torch.optim.AdamW(groups, **_settings(section), fused=True)


def deepspeed_adamw(groups: Groups, section: OptimizerSection, device: torch.device) -> Optimizer:
    """DeepSpeed's FusedAdam, or CPUAdam where the masters are on the CPU. Compiles at the first use on a machine.

    Raises:
        UserError: it can't be compiled, although what that takes seemed to be there.
    """
    doing("compiling DeepSpeed's Adam", patient=True)
    made = _DeepSpeedCPU if device.type == "cpu" else _DeepSpeedFused
    try:
        return made(groups, **_settings(section))
    except (RuntimeError, OSError, ImportError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(
            f"optimizer.backend: DeepSpeed's Adam can't be compiled or loaded: {reason}; say torch or auto"
        ) from error


def apex_adamw(groups: Groups, section: OptimizerSection, device: torch.device) -> Optimizer:
    """NVIDIA apex's FusedAdam."""
    fused = importlib.import_module("apex.optimizers").FusedAdam
    made: type[Any] = type("ApexFusedAdam", (_AsksHost, _StepPerTensor, fused), {})
    optimizer: Optimizer = made(groups, **_settings(section), adam_w_mode=True)
    return optimizer


def _settings(section: OptimizerSection) -> dict[str, Any]:
    return {"lr": section.learning_rate, "betas": (section.beta1, section.beta2), "eps": section.epsilon}


def _serves(task: Task) -> None:
    return None


def _apex_refusal(task: Task) -> str | None:
    if task.device.type != "cuda":
        return f"it needs the masters on a CUDA device and they are on the {task.device.type}"
    if not nvidia_apex_available():
        return "NVIDIA's apex is not installed (github.com/NVIDIA/apex; PyPI's apex is another project)"
    source = "apex with its CUDA extensions, from github.com/NVIDIA/apex"
    return import_failure("amp_C", source) or import_failure("apex.optimizers", source, "FusedAdam")


def _deepspeed_refusal(task: Task) -> str | None:
    """What its builders need, found without building: their own `is_compatible` looks for no compiler."""
    builder = (CPUAdamBuilder if task.device.type == "cpu" else FusedAdamBuilder)()
    if importlib.util.find_spec(builder.absolute_name()) is not None:
        return None  # compiled when DeepSpeed was installed
    if not builder.is_compatible(verbose=False):
        return f"DeepSpeed can't compile it here: {builder.error_log}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"DeepSpeed compiles it and there is no C++ compiler ({compiler})"
    if not cpp_extension.is_ninja_available():
        return "DeepSpeed compiles it and there is no ninja (pip install ninja)"
    return _nvcc_refusal(builder.name) if task.device.type == "cuda" else None


def _nvcc_refusal(name: str) -> str | None:
    """nvcc must be there, of the CUDA that torch was built with."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            assert_no_cuda_mismatch(name)
    except Exception as error:  # classes of DeepSpeed's that differ by version
        return f"DeepSpeed compiles it with nvcc: {' '.join(str(error).split())}"
    return None


# The preferred one first. On the CPU measured: docs/benchmarks.md, "The optimizer's step". On a GPU NOT measured; the
# order there is from sources. torch's fused AdamW was written after apex's (pytorch pull request 81705, "APEX style
# Fused Adam") and reads and writes each number once as well, so that none can be much faster than another; DeepSpeed's
# is a copy of apex's. torch's alone is compiled already and leaves a step out without asking the host. DeepSpeed's is
# the last since it is compiled at its first use, and since a user measured 220 ms with DeepSpeed's default and 18.5 ms
# with torch's (4 billion parameters over four RTX 5090, DeepSpeed pull request 8512).
TABLE: Table = {
    OPERATION: {
        "torch": Backend(_serves, torch_adamw),
        "apex": Backend(_apex_refusal, apex_adamw),
        "deepspeed": Backend(_deepspeed_refusal, deepspeed_adamw),
    }
}


def choose(recipe: Recipe, device: torch.device) -> Choice:
    """The backend of the recipe's optimizer; its `function` makes an optimizer of groups, section and device.

    Args:
        recipe: with `optimizer.backend`.
        device: the model's; the masters are on the CPU where the DeepSpeed file offloads the optimizer.

    Raises:
        UserError: the one that the recipe asks for cannot serve here; says why.
    """
    task = dispatch.task(masters_device(recipe, device), torch.float32)
    try:
        return dispatch.choose(OPERATION, task, recipe.optimizer.backend, TABLE)
    except UnservableError as error:
        raise UserError(f"optimizer.backend: {error}") from None


def make(recipe: Recipe, parameters: Iterable[nn.Parameter], device: torch.device) -> tuple[Optimizer, Choice]:
    """The recipe's optimizer over the model's parameters, and the choice of it. Arguments and errors as `choose`."""
    choice, groups = choose(recipe, device), param_groups(parameters, recipe.optimizer)
    optimizer: Optimizer = choice.function(groups, recipe.optimizer, masters_device(recipe, device))
    return optimizer, choice


def masters_device(recipe: Recipe, device: torch.device) -> torch.device:
    """Where the fp32 masters are: on the model's device, or the CPU where they are offloaded."""
    return torch.device("cpu") if offloads_optimizer(deepspeed_config(recipe)) else device


def explain(device: torch.device) -> list[Row]:
    """Every backend for masters on `device`."""
    return dispatch.explain(OPERATION, dispatch.task(device, torch.float32), TABLE)
