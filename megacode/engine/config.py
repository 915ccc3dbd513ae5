"""The DeepSpeed configuration: a file from ds_configs/ for what is DeepSpeed's own, the recipe for everything else."""

import json
from pathlib import Path
from typing import Any

from megacode.errors import UserError
from megacode.plan.model import block_parameters
from megacode.recipe import Recipe

RECIPE_OWNS = {
    "train_batch_size": "batch.global_samples",
    "train_micro_batch_size_per_gpu": "batch.micro_samples",
    "gradient_accumulation_steps": "batch.global_samples",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "data_types": "precision",
}
"""Top-level keys of DeepSpeed that a recipe decides, and where it does."""

ELEMENTS = {"reduce_bucket_size": 1, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}
"""Keys of zero_optimization that the plan reckons with, and their least values."""

ZERO_OWNS = {"stage3_max_reuse_distance": "parallel.gather"}
"""Keys of zero_optimization that a recipe decides."""

REFUSED = {
    "amp": "arithmetic is bf16 or fp32, by the recipe's precision",
    "torch_autocast": "arithmetic is bf16 or fp32, by the recipe's precision",
    "sequence_parallel_size": "ranks share a sequence by the recipe's parallel.context and parallel.sequence",
    "zero_optimization.memory_efficient_linear": "it would replace F.linear for the whole process",
    "zero_optimization.zero_hpz_partition_size": "checkpoints would not find the weights",
    "zero_optimization.zero_quantized_weights": "checkpoints would not find the weights",
    "zero_optimization.zero_quantized_gradients": "the reduced gradients would not be the step's",
    "prescale_gradients": "the recipe's loss is scaled once",
    "gradient_predivide_factor": "the recipe's loss is scaled once",
    "tensor_parallel": "say parallel.tensor in the recipe",
    "wandb": "say logging.wandb in the recipe",
}
"""Keys that what runs here does not stand, and why; false, 1 and auto are the same as leaving them out."""

EVERYTHING = 10**13
"""More elements than any rank holds."""

BUCKET_ELEMENTS = 50_000_000
"""Of a bucket, where the file leaves it to us."""


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    """What DeepSpeed is given.

    gradient_accumulation_steps is 1 whatever the number of micro-batches: the engine would divide every stage's
    gradients by it, and the loss is already scaled by the valid tokens of the whole step.

    Raises:
        UserError: the file is missing, is not JSON, or says something that the recipe decides differently.
    """
    config = _read(recipe.deepspeed_config) if recipe.deepspeed_config else {}
    zero = config.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{recipe.deepspeed_config}: zero_optimization must be a JSON object")
    _check(recipe, config, zero)
    for key in RECIPE_OWNS:
        config.pop(key, None)
    zero["stage"] = recipe.parallel.zero
    config["train_micro_batch_size_per_gpu"] = recipe.batch.micro_samples
    config["gradient_accumulation_steps"] = 1
    config["gradient_clipping"] = recipe.optimizer.clip
    if recipe.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}  # it would wait for the device; see DeviceSkip
        # Reduced in bf16, each data rank's gradients are rounded once more.
        _fill(config, "communication_data_type", "fp32")
        if recipe.parallel.reduce_policy == "microbatch":
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    parallel = recipe.parallel
    if parallel.zero == 3:
        # Kept until the step's last use, or released after each use; `auto` leaves the choice to the recipe.
        reuse = EVERYTHING if parallel.gather_policy == "step" else 0
        _fill(zero, "stage3_max_reuse_distance", reuse)
        # Of what is released after each use, one block is gathered ahead: a smaller bucket would leave the rest of the
        # block to its own use, which would wait for it.
        block = block_parameters(recipe.model, parallel.tensor)
        live = 2 * block if parallel.gather_policy == "microbatch" else EVERYTHING
        _fill(zero, "stage3_max_live_parameters", live)
        _fill(zero, "stage3_prefetch_bucket_size", max(BUCKET_ELEMENTS, block))
        _fill(zero, "stage3_param_persistence_threshold", 0)
        zero.setdefault("memory_efficient_linear", False)  # it would replace F.linear for the whole process
    _fill(zero, "reduce_bucket_size", BUCKET_ELEMENTS)
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)  # its CPU Adam would be compiled at start
    config.setdefault("steps_per_print", None)
    # From the third step on its throughput timer would wait for the device at every forward.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    return config


def offloads_optimizer(config: dict[str, Any]) -> bool:
    """Whether what DeepSpeed is given keeps masters and moments in the host's memory."""
    return _offloads(config["zero_optimization"], "optimizer")


def _offloads(zero: dict[str, Any], what: str) -> bool:
    return bool((zero.get(f"offload_{what}") or {}).get("device", "none") != "none")


def _read(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"deepspeed_config: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"deepspeed_config: {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"deepspeed_config: {path} must hold a JSON object")
    return config


def _check(recipe: Recipe, config: dict[str, Any], zero: dict[str, Any]) -> None:
    path = recipe.deepspeed_config
    stage = zero.get("stage", "auto")
    if stage not in ("auto", recipe.parallel.zero):
        raise UserError(
            f"{path}: zero_optimization.stage is {stage!r} and the recipe's parallel.zero is {recipe.parallel.zero}; "
            f"make them equal"
        )
    for key, owner in RECIPE_OWNS.items():
        if config.get(key, "auto") != "auto":
            raise UserError(f"{path}: {key} is decided by the recipe's {owner}; remove it from the file or say auto")
    for key, owner in ZERO_OWNS.items():
        if zero.get(key, "auto") != "auto":
            raise UserError(f"{path}: zero_optimization.{key} is decided by the recipe's {owner}; say auto")
    for key, reason in REFUSED.items():
        section, _, name = key.rpartition(".")
        value = (zero if section else config).get(name)
        if value not in (None, False, 1, "auto") or value is True:
            raise UserError(f"{path}: {key} can't be used ({reason}); remove it")
    reduced = config.get("communication_data_type", "auto")
    if reduced not in (None, "auto", "fp32", "bf16"):
        raise UserError(f"{path}: communication_data_type is {reduced!r}; say fp32 or bf16")
    for key, least in ELEMENTS.items():
        value = zero.get(key, "auto")
        number = isinstance(value, int | float) and not isinstance(value, bool) and value >= least
        if value != "auto" and not number:
            raise UserError(f"{path}: zero_optimization.{key} is {value!r}; give a number of elements, or auto")
    _check_offload(recipe, zero)


def _check_offload(recipe: Recipe, zero: dict[str, Any]) -> None:
    path, parallel = recipe.deepspeed_config, recipe.parallel
    for key in ("offload_param", "offload_optimizer"):
        if (zero.get(key) or {}).get("device") == "nvme":
            raise UserError(f"{path}: zero_optimization.{key}.device nvme can't be used; say cpu")
    offload = _offloads(zero, "optimizer")
    # Below ZeRO-3 it has the norms of offloaded gradients before those of tensor ranks are summed.
    if offload and parallel.sequence and parallel.zero < 3:
        raise UserError(
            f"{path}: zero_optimization.offload_optimizer with the recipe's parallel.sequence needs parallel.zero: 3"
        )
    # DeepSpeed copies an offloaded chunk's gradients at the step's last backward only, which is another chunk's.
    if offload and parallel.virtual_stages > 1 and parallel.reduce_policy == "microbatch":
        raise UserError(
            f"{path}: zero_optimization.offload_optimizer with the recipe's parallel.virtual_stages above 1 needs "
            f"parallel.reduce: step"
        )


def _fill(section: dict[str, Any], key: str, value: int | str) -> None:
    if section.get(key, "auto") == "auto":
        section[key] = value
