"""The recipe: all that makes a run what it is, typed. Loaded from YAML, overridden by key.path=value.

A recipe may name a `base` (another recipe, relative to its own folder) and say only what differs.
"""

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from megacode.errors import UserError
from megacode.model.presets import PRESETS

Recompute = Literal["none", "selective", "full"]
"""What backward computes again instead of keeping: nothing; what is cheap to compute and large; whole blocks."""


class _KeyTwiceError(Exception):
    """A key stands twice in one mapping, which YAML's readers let pass."""

    def __init__(self, key: str, lines: tuple[int, int]) -> None:
        super().__init__(f"the key `{key}` stands twice")
        self.lines = lines


class _Loader(yaml.SafeLoader):
    """YAML as its users write it: 3e-4 is a number (in YAML 1.1 a string, for want of a dot), no key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                raise _KeyTwiceError(name, (lines[name], line))
            lines[name] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(text: str) -> Any:
    """Raises: yaml.YAMLError, _KeyTwiceError."""
    return yaml.load(text, Loader=_Loader)


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, docstrings under the fields are their help texts."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )


class ModelSection(Section):
    """Shape of the transformer (Llama architecture: RMSNorm, RoPE, SwiGLU, untied head)."""

    preset: str | None = None
    """Name of a preset in megacode/model/presets.py; fields given beside it replace the preset's."""
    layers: int = Field(gt=0)
    """Number of transformer blocks."""
    hidden: int = Field(gt=0)
    """Width of the residual stream."""
    heads: int = Field(gt=0)
    """Number of query heads; head_dim = hidden / heads."""
    kv_heads: int = Field(gt=0)
    """Number of key and value heads; equal to heads for MHA, fewer for GQA."""
    ffn: int = Field(gt=0)
    """Width of the SwiGLU feed-forward."""
    vocabulary: int | None = Field(default=None, gt=0)
    """Rows of the embedding and the head; left out, the tokenizer decides."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Added to the mean square in RMSNorm."""
    max_positions: int = Field(default=4096, gt=0)
    """Longest context the export declares, in tokens."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        name = data.get("preset") if isinstance(data, dict) else None
        if name is None:
            return data
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; known are {', '.join(PRESETS)}")
        return {**PRESETS[name], **data}

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelSection":
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = hidden / heads is {self.head_dim}; RoPE needs an even one")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


class TokenizerSection(Section):
    path: str
    """The SentencePiece model."""


class SourceSection(Section):
    """A source of training samples; they are blended by weight."""

    name: str = Field(min_length=1)
    """What metrics and checkpoints call it."""
    weight: float = Field(gt=0)
    """Its share of the samples; weights need not sum to 1."""
    shards: list[str] = Field(min_length=1)
    """Prefixes of its shards, or patterns of them with *, ? or ** (corpus/code-*)."""


class DataSection(Section):
    train: str | list[SourceSection]
    """Prefix of the training shards: PREFIX.bin and PREFIX.idx; or a list of sources that are blended."""
    valid: str | None = None
    """Prefix of the validation shards; left out, the run does not validate."""
    infilling_rate: float = Field(default=0.9, ge=0, le=1)
    """Share of the uncut documents that become infilling documents (Code Llama: 0.9)."""
    suffix_first_rate: float = Field(default=0.5, ge=0, le=1)
    """Share of the infilling documents in suffix-prefix-middle order (Code Llama: half)."""
    document_masks: bool = False
    """Attention and positions stop at document boundaries."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents become sequences: laid end to end and cut where a sequence is full (Code Llama); or packed so that
    none is cut that fits into one."""
    workers: int = Field(default=1, ge=0)
    """Processes of each rank that make its micro-batches ahead of the steps; 0: it makes each when it needs it."""

    @field_validator("train", mode="before")
    @classmethod
    def _check_train(cls, train: Any) -> Any:
        """Pydantic would name what speaks against each member of the union."""
        if not isinstance(train, list):
            if not isinstance(train, str):
                raise ValueError(f"must be a prefix, or a list of sources with name, weight and shards; not {train!r}")
            return train
        sources = []
        for number, values in enumerate(train):
            try:
                sources.append(SourceSection.model_validate(values))
            except ValidationError as error:
                raise ValueError(f"source {number}: {_one_line(error, SourceSection)}") from None
        names = [source.name for source in sources]
        if len(set(names)) < max(1, len(names)):
            raise ValueError(f"needs sources with names that differ, not {names}")
        return sources


class ParallelSection(Section):
    tensor: int = Field(default=1, gt=0)
    """Ranks that share each layer (tensor parallelism)."""
    sequence: bool = False
    """Tensor ranks also share norms and residuals, along the sequence (sequence parallelism)."""
    context: int = Field(default=1, gt=0)
    """Ranks that share each sequence (context parallelism), for contexts too long for one device."""
    pipeline: int = Field(default=1, gt=0)
    """Stages that share the layers (pipeline parallelism)."""
    virtual_stages: int = Field(default=1, gt=0)
    """Chunks of layers that each pipeline rank holds; above 1 the schedule is interleaved 1F1B."""
    stages: Literal["even", "weighed"] | list[int] = "even"
    """Layers of each stage: equal numbers; equal with the embedding and the head weighed as a layer each; or given by
    hand, one number a virtual stage in the model's order."""
    recompute: Recompute = "none"
    """What backward computes again instead of keeping: nothing; norms and SwiGLU; whole blocks."""
    zero: Literal[1, 2, 3] = 1
    """ZeRO stage: 1 shards the optimizer over the data ranks, 2 the gradients too, 3 the parameters too."""
    gather: Literal["step", "microbatch"] | None = None
    """ZeRO-3: gather each parameter once a step, or for each micro-batch. Left out: step."""
    reduce: Literal["step", "microbatch"] | None = None
    """Reduce gradients once a step, or after each micro-batch. Left out: step under ZeRO-1, else microbatch."""

    @field_validator("stages", mode="before")
    @classmethod
    def _check_stages(cls, stages: Any) -> Any:
        """Pydantic would name what speaks against each member of the union, under names of its own."""
        words = isinstance(stages, str) and stages in ("even", "weighed")
        if words or (isinstance(stages, list) and all(type(count) is int for count in stages)):
            return stages
        raise ValueError(f"must be even, weighed, or whole numbers [2, 1, ...], a stage's layers each; not {stages!r}")

    @model_validator(mode="after")
    def _check(self) -> "ParallelSection":
        if self.gather == "microbatch" and self.zero < 3:
            raise ValueError(f"gather: microbatch needs zero: 3, and zero is {self.zero}; leave gather out")
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor above 1: it is the tensor ranks that share the sequence")
        if isinstance(self.stages, list) and len(self.stages) != self.pipeline * self.virtual_stages:
            raise ValueError(
                f"stages names {len(self.stages)} stages and there are pipeline x virtual_stages = "
                f"{self.pipeline * self.virtual_stages}; give one number of layers for each"
            )
        if self.virtual_stages > 1 and self.pipeline == 1:
            raise ValueError("virtual_stages above 1 needs pipeline above 1; set virtual_stages: 1")
        if self.reduce == "microbatch" and self.zero < 2:
            raise ValueError("reduce: microbatch needs zero: 2 or 3 (ZeRO-1 keeps whole gradients); leave reduce out")
        return self

    @property
    def gather_policy(self) -> Literal["step", "microbatch"]:
        """`gather`, with its default filled in."""
        return self.gather or "step"

    @property
    def reduce_policy(self) -> Literal["step", "microbatch"]:
        """`reduce`, with its default filled in."""
        return self.reduce or ("step" if self.zero == 1 else "microbatch")


class KernelsSection(Section):
    """Which backend computes an operation. auto: the fastest that is right for device, dtype, shape and mask; a start
    says which and why. One that is named and cannot serve ends the start with the reason."""

    attention: Literal["auto", "flash_attn_3", "cudnn", "flash_attn", "sdpa_flash", "triton", "torch"] = "auto"
    """Causal attention, inside of documents where there are document masks."""
    rope: Literal["auto", "triton", "torch"] = "auto"
    """Rotary positions of q and k."""
    rms_norm: Literal["auto", "triton", "apex", "liger", "torch"] = "auto"
    """RMSNorm, alone and with the residual sum before it."""
    swiglu: Literal["auto", "triton", "liger", "torch"] = "auto"
    """silu(gate) * up of the feed-forward."""
    cross_entropy: Literal["auto", "triton", "torch"] = "auto"
    """The loss of each label, its gradient in place of the logits."""


class BatchSection(Section):
    global_samples: int = Field(gt=0)
    """Sequences of one optimizer step, over all ranks."""
    micro_samples: int = Field(gt=0)
    """Sequences of one micro-batch on one data rank."""
    sequence_length: int = Field(gt=0)
    """Tokens of one sequence."""


class OptimizerSection(Section):
    """AdamW (Loshchilov and Hutter 2019); defaults are Code Llama's and, where it is silent, Llama 2's."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the mean of squared gradients."""
    epsilon: float = Field(default=1e-5, gt=0)
    """Added to the root in Adam's denominator."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; norms are left out of it."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm over the whole model; 0 does not clip."""
    backend: Literal["auto", "torch", "apex", "deepspeed"] = "auto"
    """Whose code makes the step: torch's fused AdamW, NVIDIA apex's FusedAdam, or DeepSpeed's, compiled at its first
    use: FusedAdam, and CPUAdam without a GPU or with an offloaded optimizer. auto: the fastest that is there."""


class ScheduleSection(Section):
    """Linear warm-up to the peak, then a cosine down to peak * final_ratio at the last step."""

    steps: int = Field(gt=0)
    """Optimizer steps of the run."""
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps of the linear warm-up."""
    final_ratio: float = Field(default=1 / 30, ge=0, le=1)
    """Last learning rate over the peak (Code Llama: 1/30)."""

    @model_validator(mode="after")
    def _check(self) -> "ScheduleSection":
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        return self


class CheckpointSection(Section):
    every_steps: int = Field(default=1000, gt=0)
    """A checkpoint after every so many steps, and one at the end."""
    start_from: str | None = None
    """A new stage: a checkpoint folder, of a run or converted, whose weights a new run starts from. Optimizer, schedule
    and data begin anew; model.rope_theta, model.max_positions and the sequence length may be others."""


class LoggingSection(Section):
    validate_every_steps: int = Field(default=1000, gt=0)
    """A validation after every so many steps, and one at the end."""
    validation_samples: int | None = Field(default=None, gt=0)
    """Sequences of one validation, in whole batches of global_samples; left out, the whole validation set."""
    peak_teraflops: float | None = Field(default=None, gt=0)
    """Peak of one rank's device, for MFU; left out, known for A100, H100 and H200, and no MFU elsewhere."""
    wandb: str | None = None
    """Weights & Biases project to log to (offline unless logged in); left out, it is not used."""
    tensorboard: bool = False
    """Write TensorBoard files to RUN/tensorboard."""
    phases: bool = False
    """Measure the phases of each step (costs a little: on a GPU it waits for the device once a step)."""
    profile_steps: list[int] = Field(default=[])
    """Steps of which torch's profiler writes a trace to RUN/profile."""
    profile_ranks: list[int] = Field(default=[0])
    """Ranks that write these traces."""


class FaultsSection(Section):
    collective_timeout_seconds: float = Field(default=600, gt=0)
    """A collective that waits longer ends the run with an error."""
    stall_seconds: float = Field(default=300, gt=0)
    """When no rank has gone on for so long, the run ends and says which rank the others wait for: more than a start
    before its first step, a micro-batch or (on a GPU) a step takes; reading and writing checkpoints is not counted."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient norm is not finite: end the run, or leave out its update and go on."""
    skips_in_a_row: int = Field(default=10, gt=0)
    """So many steps left out one after the other end the run."""

    @model_validator(mode="after")
    def _check(self) -> "FaultsSection":
        if self.stall_seconds >= self.collective_timeout_seconds:
            raise ValueError(
                f"stall_seconds ({self.stall_seconds:g}) must be below collective_timeout_seconds "
                f"({self.collective_timeout_seconds:g}), which ends the run without saying who is to blame"
            )
        return self


class Recipe(Section):
    """A whole run. See launchers/recipes/demo.yaml for a commented one."""

    run: str
    """The run folder."""
    seed: int = Field(default=0, ge=0)
    """Every random choice is a function of this, of the step and of names."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the model; master weights and Adam are always fp32. fp16 does not exist here."""
    deepspeed_config: str | None = None
    """A DeepSpeed JSON file (see ds_configs/); left out, the plain ZeRO stage of `parallel.zero`."""
    model: ModelSection
    tokenizer: TokenizerSection
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    kernels: KernelsSection = KernelsSection()
    batch: BatchSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    faults: FaultsSection = FaultsSection()

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.batch.sequence_length > self.model.max_positions:
            raise ValueError(
                f"batch.sequence_length ({self.batch.sequence_length}) is beyond model.max_positions "
                f"({self.model.max_positions}); raise the one or lower the other"
            )
        return self

    def save(self, path: Path) -> None:
        """Write the resolved recipe, every default filled in, as YAML that `load` reads back to an equal recipe."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file; its key `base`, if any, names the recipe that it differs from.
        overrides: `key.path=value`, later ones win; values are YAML.

    Raises:
        UserError: the file, a key or a value is wrong; the message names it.
    """
    path = Path(path)
    values = _read(path)
    for override in overrides or []:
        _override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_one_line(error)}") from None


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: its `base` leads back to itself")
    try:
        values = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from None
    except _KeyTwiceError as error:
        first, second = error.lines
        raise UserError(f"{path}, line {second}: {error}, the first time in line {first}; leave one out") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
        raise UserError(f"{path} is not YAML: {what}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no recipe: it must be a YAML mapping with the sections model, data, batch, ...")
    base = values.pop("base", None)
    values = {key: {} if value is None and _is_section(key) else value for key, value in values.items()}  # left empty
    if base is None:
        return values
    return _merge(_read(path.parent / str(base), (*seen, path.resolve())), values)


def files_of(path: str | Path) -> list[Path]:
    """Of a recipe that `load` has read: its file and those that it is based on."""
    path = Path(path)
    base = _parse(path.read_text(encoding="utf-8")).get("base")
    return [path.resolve(), *(files_of(path.parent / str(base)) if base is not None else [])]


def _is_section(key: str) -> bool:
    field = Recipe.model_fields.get(key)
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both_sections = {k for k in over if isinstance(over[k], dict) and isinstance(base.get(k), dict)}
    return {**base, **{k: _merge(base[k], v) if k in both_sections else v for k, v in over.items()}}


def _override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"override {override!r} is not key.path=value, for example schedule.steps=100")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"override {override!r}: {section} is a value, not a section")
    try:
        values[last] = _parse(text)
    except _KeyTwiceError as error:
        raise UserError(f"override {override!r}: {error}; leave one out") from None
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: {text!r} is not a YAML value") from None


def _one_line(error: ValidationError, section: type[Section] | None = None) -> str:
    """The first mistake of a pydantic error, with the key's path and, for an unknown key, the nearest known one.

    Args:
        section: that was validated; left out, a whole recipe.
    """
    first, *others = error.errors()
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        known = _keys_at(section or Recipe, [str(part) for part in first["loc"][:-1]])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        message = f"unknown key; did you mean {near[0]}?" if near else f"unknown key; known are {', '.join(known)}"
    elif first["type"] == "missing":
        missing = [".".join(map(str, each["loc"])) for each in others if each["type"] == "missing"]
        message = f"is missing{', so are ' + ', '.join(missing) if missing else ''}; give "
        message += "each a value" if missing else "it a value"
    elif first["type"] == "model_type":
        message = f"is a section; give it keys of its own, not {first['input']!r}"
    elif first["type"] not in ("value_error",):
        message = f"{message}, not {first['input']!r}"
    return f"{where}: {message}" if where else message  # a check across sections names its keys itself


def _keys_at(section: type[BaseModel], path: list[str]) -> list[str]:
    for name in path:
        annotation = section.model_fields[name].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        section = annotation
    return list(section.model_fields)
