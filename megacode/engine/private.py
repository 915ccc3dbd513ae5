"""Every private name of DeepSpeed that megacode touches, and the cures for running a pipeline over its ZeRO engines.

Each function is one cure; docs/architecture.md lists them, tests/dist/ shows what goes wrong without. Names belong to
DeepSpeed 0.19.8: `check_version` refuses another, since a name that moved would give wrong gradients, not an error.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3, stage_1_and_2, utils
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megacode.errors import UserError
from megacode.parallel.heartbeat import awaiting_device, communicating, finishing
from megacode.parallel.mesh import Mesh

VERSION = "0.19.8"
ADAM_STATES = ("exp_avg", "exp_avg_sq")
COLLECTIVES = {
    "all_reduce": "all-reduce", "all_reduce_coalesced": "all-reduce", "reduce": "reduce", "broadcast": "broadcast",
    "all_gather": "all-gather", "all_gather_into_tensor": "all-gather", "all_gather_coalesced": "all-gather",
    "all_gather_object": "all-gather", "broadcast_object_list": "broadcast", "reduce_scatter": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter", "all_to_all_single": "all-to-all", "barrier": "barrier",
}  # fmt: skip
"""Methods of DeepSpeed's backend that all ranks of a group call, and what they are."""
CONFIG_KEYS = {
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last",
    "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler",
    "fp16", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor",
    "hybrid_engine", "log_level", "managed_gradient_accumulation", "memory_breakdown", "optimizer", "pipeline",
    "prescale_gradients", "scheduler", "seq_parallel_communication_data_type", "sequence_parallel_size",
    "steps_per_print", "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown",
    "wandb", "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}  # fmt: skip
"""Top-level keys that DeepSpeedConfig reads; it takes no notice of others."""


def check_version() -> None:
    """Refuse a DeepSpeed whose private names were not checked."""
    if deepspeed.__version__.split("+")[0] != VERSION:
        raise UserError(
            f"deepspeed {deepspeed.__version__} is installed and megacode works with {VERSION} only; "
            f"pip install deepspeed=={VERSION}"
        )


def check_config(config: dict[str, Any], path: str | None) -> None:
    """Refuse keys that DeepSpeed would leave unread, and what it would refuse in zero_optimization when it is too late
    for a line.

    Raises:
        UserError: names the file and the first key that is unknown or has a wrong value.
    """
    for key in config:
        if key not in CONFIG_KEYS:
            raise UserError(f"{path}: {key}: {_unknown(key, CONFIG_KEYS)}")
    try:
        DeepSpeedZeroConfig(**config["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        known = DeepSpeedZeroConfig.model_fields if len(place) == 1 else ()
        wrong = _unknown(place[-1], known) if first["type"] == "extra_forbidden" else first["msg"]
        raise UserError(f"{path}: {'.'.join(('zero_optimization', *place))}: {wrong}") from None


def _unknown(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    return f"unknown to DeepSpeed {VERSION}; " + (f"did you mean {near[0]}? Else remove it" if near else "remove it")


def skip_shared_memory_op() -> None:
    """On the CPU DeepSpeed compiles a shared-memory op at start: 25-40 s, and a killed build hangs the next start.

    `import deepspeed.comm.torch as x` would give torch itself (the package has an attribute of that name).
    """
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def import_muon_plainly() -> None:
    """DeepSpeed imports its Muon with any engine and decorates it by torch.compile: 1 s of a core, for nothing here."""
    decorate = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = decorate


def skip_device_count() -> None:
    """On the CPU DeepSpeed starts numactl at every reduction to count devices, unless LOCAL_SIZE tells it.

    Its launcher sets LOCAL_SIZE, torchrun and srun do not. The count matters to quantised gradients only.
    """
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))


def expect_segments() -> None:
    """ZeRO-3 warns once of a module's input that is neither tensor nor builtin: gradients in it would go unseen.

    Ours are the `Segments` of a micro-batch, whose tensors are integers.
    """
    utils.warned = True


def check_traces_within(group: ProcessGroup) -> None:
    """ZeRO-3 compares its module trace with rank 0 of the WORLD: stages differ by design, so it would hang there.

    The numbers are compared from their smallest on: ids are counted through a process's life, and ranks that held other
    stages of an earlier engine start elsewhere.
    """

    def assert_same(ints: Iterable[int]) -> None:
        ints = list(ints)
        seen: list[Any] = [None] * dist.get_world_size(group)
        with communicating("all-gather", "data"):
            dist.all_gather_object(seen, [i - min(ints) for i in ints], group=group)
        assert all(other == seen[0] for other in seen), "ranks of one stage recorded different module orders"

    for module in (partitioned_param_coordinator, partition_parameters, stage3):
        module.assert_ints_same_as_other_ranks = assert_same


def mark_norm_owner(parameter: nn.Parameter, owned: bool) -> None:
    """The norm counts a parameter on model-parallel rank 0 only, unless it is marked: mark exactly one copy of each.

    Without it the norm, and with it clipping, leaves out all stages but the first.
    """
    if owned:
        parameter.model_parallel = True  # type: ignore[attr-defined]


def start_backward(zero: Any) -> None:
    """Tell the optimizer that a new backward begins: it else learns so from a forward only.

    Two backwards in a row (1F1B's cool-down) would overwrite the first's gradients, and the second's end-of-backward
    work would not be queued.
    """
    zero.clear_backward_seen_flag()


def own_the_trace(zero: Any) -> None:
    """ZeRO-3: record one trace of the whole step instead of one a forward, which 1F1B's order breaks every time."""
    zero.parameter_offload.fwd_pre_hook.remove()


def gather_whole(model: nn.Module, kind: type[nn.Module]) -> None:
    """ZeRO-3: gather a module of this kind at once, by hooks on it alone instead of on each of its parts.

    A hooked module costs about 0.2 ms of a CPU core in a micro-batch, and linear maps of one input are not called
    as modules, so that hooks on them would not run. DeepSpeed would also hold back the gradients of
    such a module until its backward has ended, and put zeros where `Fp32Gradients` has taken one away: that is for
    experts without tokens, and left out.
    """
    set_z3_leaf_modules(model, [kind], raise_if_not_found=False)
    stage3.z3_leaf_parameter = lambda parameter: False


def start_trace(zero: Any) -> None:
    """ZeRO-3: a pass over the modules in the recorded order begins."""
    zero.parameter_offload.get_param_coordinator().reset_step()


def keep_leftovers(zero: Any) -> Callable[[], None]:
    """ZeRO-3 releases leftovers after every backward, against the trace; returns the release, to call once a step."""
    release: Callable[[], None] = zero.parameter_offload.release_backward_leftovers
    zero.parameter_offload.release_backward_leftovers = lambda: None
    return release


def clear_partitions(zero: Any) -> None:
    """ZeRO-3, reducing every micro-batch: start the step with empty gradient partitions, and add from the start.

    It copies on the first backward of a step and adds afterwards; an interleaved chunk whose first backward comes later
    would add onto the last step's gradients.
    """
    zero.grad_partitions_flat_buffer.zero_()
    zero.micro_step_id = 1


@contextmanager
def validation_trace(zero: Any) -> Any:
    """ZeRO-3: a validation's order of modules differs; it gets a coordinator, and so a trace, of its own."""
    offload = zero.parameter_offload
    training = offload.param_coordinator
    if not hasattr(offload, "megacode_validation_coordinator"):
        offload.megacode_validation_coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator(
            prefetch_bucket_sz=offload._prefetch_bucket_sz,
            max_reuse_distance_in_numel=offload._max_reuse_distance_in_numel,
            max_available_parameters_in_numel=offload._max_available_parameters_in_numel,
            allgather_stream=offload._DeepSpeedZeRoOffload__allgather_stream,
            inflight_param_registry=offload._DeepSpeedZeRoOffload__inflight_param_registry,
        )
        _mark(offload.megacode_validation_coordinator, "fetch_sub_module", partial(finishing, "all-gather", "data"))
    offload.param_coordinator = offload.megacode_validation_coordinator
    try:
        start_trace(zero)
        yield
    finally:
        offload.param_coordinator.release_and_reset_all(offload.module)
        offload.param_coordinator = training


class DeviceSkip:
    """Decides on the device whether an update is left out: DeepSpeed would ask the host, and wait for it, every step.

    torch's fused AdamW leaves parameters, moments and step count alone where its `found_inf` is 1. The loss counts
    too: it can overflow where the gradients do not.
    """

    def __init__(self, zero: Any) -> None:
        for module in (stage3, stage_1_and_2):
            module.is_invalid_grad_norm = lambda norm: False
        self.zero, self.loss = zero, torch.zeros(())
        self._clip = zero.unscale_and_clip_grads
        zero.unscale_and_clip_grads = self._decide_and_clip

    def _decide_and_clip(self, gradients: Any, norm: Tensor) -> None:
        found = (~(norm.isfinite() & self.loss.to(norm.device).isfinite())).float()
        # Where the optimizer is offloaded, AdamW would copy it to the host without waiting, and read it too early.
        self.zero.optimizer.found_inf = found.to(masters(self.zero)[0].device)
        self._clip(gradients, norm)

    @property
    def skipped(self) -> Tensor:
        """1 where the last update was left out, else 0."""
        return self.zero.optimizer.found_inf


def mark_communication(zero: Any) -> None:
    """Say when a rank stands in DeepSpeed's gathers and reductions, whose single calls may only start them."""
    if hasattr(zero, "parameter_offload"):
        gather = zero.parameter_offload.get_param_coordinator()
        _mark(gather, "fetch_sub_module", partial(finishing, "all-gather", "data"))
        reduce = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"
        _mark(zero, reduce, partial(finishing, "reduce-scatter", "data"))
    else:
        _mark(zero, "reduce_ipg_grads", partial(finishing, "reduction", "data"))
    _mark(zero, "independent_gradient_partition_epilogue", awaiting_device)  # after each reduction, on a GPU


def _mark(owner: Any, name: str, mark: Callable[[], AbstractContextManager[None]]) -> None:
    original = getattr(owner, name)

    def marked(*args: Any, **kwargs: Any) -> Any:
        with mark():
            return original(*args, **kwargs)

    setattr(owner, name, marked)


def mark_collectives(mesh: Mesh) -> None:
    """Count DeepSpeed's collectives, each in the group that it is called with, and say when a rank stands in one.

    Its calls go through methods of one object. Called again, for an engine on another mesh, this replaces the marks.
    """
    backend, world_size = sys.modules["deepspeed.comm.comm"].cdb, dist.get_world_size()
    axes = {mesh.data_group: "data", mesh.model_group: "model", mesh.tensor_group: "tensor"}

    def axis(arguments: Iterable[Any]) -> str:
        group = next((each for each in arguments if isinstance(each, ProcessGroup)), None)
        if group is None:
            return "world"
        return axes.get(group, "world" if group.size() == world_size else "")

    def mark(name: str, kind: str) -> None:
        original = getattr(type(backend), name).__get__(backend)

        def marked(*args: Any, **kwargs: Any) -> Any:
            with communicating(kind, axis((*args, *kwargs.values()))):
                return original(*args, **kwargs)

        setattr(backend, name, marked)

    for name, kind in COLLECTIVES.items():
        mark(name, kind)


class Fp32Gradients:
    """Accumulates gradients over micro-batches in fp32, where DeepSpeed would in bf16 (coalesced reduction).

    A hook adds each gradient to an fp32 buffer and clears it; `hand_over`, before the reduction, gives the sums back
    with one rounding. Costs 4 bytes per parameter of the rank's chunks.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.sums: dict[nn.Parameter, Tensor] = {}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._add)

    def _add(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        if parameter in self.sums:
            self.sums[parameter].add_(parameter.grad)
        else:
            self.sums[parameter] = parameter.grad.float()
        parameter.grad = None

    def hand_over(self) -> None:
        """Put the sums into `.grad`, rounded to the parameter's dtype, and forget them."""
        for parameter, total in self.sums.items():
            data = parameter.data
            if data.shape != total.shape:  # released by ZeRO-3: lend it a shape, `.grad` must match it
                parameter.data = torch.zeros(1, dtype=data.dtype, device=data.device).expand(total.shape)
            parameter.grad = total.to(data.dtype)
            parameter.data = data
        self.sums.clear()


def masters(zero: Any) -> list[Tensor]:
    """The flat fp32 tensors that the wrapped torch optimizer updates."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def create_adam_state(zero: Any, step: int) -> None:
    """Make Adam's state, zero, with its step count. DeepSpeed restores moments by name but never the count."""
    for master in masters(zero):
        # torch's counts on the device, the others in Python.
        on_device = isinstance(zero.optimizer, torch.optim.AdamW)
        count = torch.tensor(float(step), device=master.device) if on_device else step
        zero.optimizer.state[master] = {"step": count, **{key: torch.zeros_like(master) for key in ADAM_STATES}}
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def adam_step(zero: Any) -> int:
    """Adam's step count."""
    return int(zero.optimizer.state[masters(zero)[0]]["step"])


def write(parameter: nn.Parameter, value: Tensor, key: str = "weight") -> None:
    """Set a parameter (master and training copy) or one of its Adam states from the whole local fp32 tensor.

    Local: each data rank passes the same value and keeps its part.
    """
    if hasattr(parameter, "ds_id"):
        _write_zero3(parameter, value, key)
    elif key == "weight":
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _write_zero3(parameter: Any, value: Tensor, key: str) -> None:
    size = parameter.ds_tensor.ds_numel
    rank = parameter.ds_process_group.rank()
    # DeepSpeed's own setter fails where the last partition is padded.
    padded = nn.functional.pad(value.flatten(), (0, size * parameter.ds_process_group.size() - value.numel()))
    mine = padded.narrow(0, size * rank, size)
    if key != "weight":
        safe_set_local_optimizer_state(parameter, mine, key)
        return
    safe_set_local_fp32_param(parameter, mine)
    parameter.ds_tensor.data.copy_(mine)
    if parameter.ds_status == partition_parameters.ZeroParamStatus.AVAILABLE:
        parameter.data.copy_(value)


def read(parameter: nn.Parameter, key: str = "weight") -> Tensor:
    """The whole local fp32 tensor of a parameter or an Adam state. Collective over the data ranks."""
    if key == "weight":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, key)


def local_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape that this rank's tensor has, padding included, also while ZeRO-3 has it sharded."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def share(parameter: Any, key: str = "weight") -> tuple[int, Tensor]:
    """This data rank's share of a parameter's fp32 values, or of an Adam state.

    Returns:
        Where it begins in the flattened local parameter, and the share [n], without the last one's padding: DeepSpeed's
        own memory, to be read only, or where it is offloaded a copy on the device. n is 0 where this rank has none.
    """
    if hasattr(parameter, "ds_id"):
        mine = (
            safe_get_local_fp32_param(parameter) if key == "weight" else safe_get_local_optimizer_state(parameter, key)
        )
        start = mine.numel() * parameter.ds_process_group.rank()
        return start, mine.detach()[: max(0, parameter.ds_numel - start)]
    mapping = parameter._hp_mapping
    if mapping is None:
        return 0, torch.empty(0, device=parameter.device)
    mine = mapping.get_hp_fragment(None if key == "weight" else key)
    return mapping.lp_fragment_address.start, mine.detach().to(parameter.device)


def span(parameter: Any, key: str = "weight") -> tuple[int, int]:
    """(start, stop) in the flattened local parameter of what `write` uses here of an Adam state, or of the weight.

    Of the weight that is all where this rank computes with a copy of it.
    """
    zero3, numel = hasattr(parameter, "ds_id"), local_shape(parameter).numel()
    available = not zero3 or parameter.ds_status == partition_parameters.ZeroParamStatus.AVAILABLE
    if key == "weight" and available:
        return 0, numel
    if zero3:
        size = parameter.ds_tensor.ds_numel
        start = size * parameter.ds_process_group.rank()
        return min(start, numel), min(start + size, numel)
    if parameter._hp_mapping is None:
        return 0, 0
    address = parameter._hp_mapping.lp_fragment_address
    return address.start, address.start + address.numel


def read_gradient(parameter: nn.Parameter) -> Tensor:
    """The whole local reduced gradient, between a schedule and the optimizer's step. Collective over the data ranks."""
    gradient = safe_get_full_grad(parameter)
    assert gradient is not None
    return gradient


def sum_gradients(parameters: Iterable[nn.Parameter], group: ProcessGroup) -> None:
    """Sum this data rank's shares of reduced gradients over ranks that have the same shares, in one all-reduce."""
    if not (mine := [parameter for parameter in parameters if _has_share(parameter)]):
        return
    shares = [_gradient_share(parameter) for parameter in mine]
    total = torch.cat([share.float().flatten() for share in shares])
    dist.all_reduce(total, group=group)
    for parameter, share, value in zip(mine, shares, total.split([s.numel() for s in shares]), strict=True):
        if _is_offloaded(parameter):
            safe_set_local_grad(parameter, value.to(share.dtype))  # it counts for the norm anew
        else:
            share.copy_(value.view(share.shape))


def _has_share(parameter: Any) -> bool:
    """Whether a part of the parameter's gradient is this data rank's to keep."""
    return hasattr(parameter, "ds_id") or parameter._hp_mapping is not None


def _is_offloaded(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id") and parameter._z3_optimizer.offload_optimizer


def _gradient_share(parameter: Any) -> Tensor:
    """This data rank's share of a reduced gradient: DeepSpeed's own tensor, or a copy where it is offloaded."""
    if _is_offloaded(parameter):
        return safe_get_local_grad(parameter)
    if hasattr(parameter, "ds_id"):
        # safe_get_local_grad has the host wait for the stream of reductions, each time; a backward has ended with that.
        return parameter._z3_optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[parameter.ds_id]
    return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
