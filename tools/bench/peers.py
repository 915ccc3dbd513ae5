"""The peers: transformers' LlamaForCausalLM under DeepSpeed's ZeRO-3, under torch's FSDP2, and alone.

Each is written as its users write it; docs/benchmarks.md lists the settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megacode.recipe import Recipe
from megacode.tools.bench.contest import Step, initial_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


def llama_config(recipe: Recipe) -> Any:
    """The recipe's shape for transformers, with torch's fused attention."""
    from transformers import LlamaConfig

    model = recipe.model
    return LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        max_position_embeddings=model.max_positions,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )


def plain(recipe: Recipe) -> Step:
    """One process, a plain loop."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llama_config(recipe))
    parameters = dict(model.named_parameters())
    decayed = set()
    with torch.no_grad():
        for name, value, decays in initial_weights(recipe):
            parameters[name].copy_(value)
            decayed |= {name} if decays else set()
    optimizer = _adamw(recipe, parameters, decayed)

    def step(batches: list[tuple[Tensor, Tensor]]) -> float:
        total = 0.0
        for tokens, labels in batches:
            loss = _loss(model, tokens, labels)
            (loss / len(batches)).backward()
            total += loss.item() / len(batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def on_shards(recipe: Recipe, device: str, liger: bool) -> Callable[[], float]:
    """One process on one device as transformers' own Trainer does it with bf16: fp32 weights under autocast, gradient
    checkpointing where the recipe recomputes anything, torch's fused AdamW; the recipe's shards and samples.

    A call of what it returns is a step; its loss.
    """
    import torch
    from transformers import LlamaForCausalLM

    from megacode.data.stream import step_indices
    from megacode.data.tokenizer import Tokenizer
    from megacode.train.start import open_streams

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    stream, _ = open_streams(recipe, Tokenizer(recipe.tokenizer.path))
    with torch.device(device):
        model = LlamaForCausalLM(llama_config(recipe))
    parameters = dict(model.named_parameters())
    decayed = set()
    with torch.no_grad():
        for name, value, decays in initial_weights(recipe, device):
            parameters[name].copy_(value)
            decayed |= {name} if decays else set()
    if recipe.parallel.recompute != "none":
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = _adamw(recipe, parameters, decayed)
    batch, first = recipe.batch, 0

    def on_device(array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor

    def step() -> float:
        nonlocal first
        losses = []
        for numbers in step_indices(first, batch.global_samples, batch.micro_samples, 1, 0):
            host = stream.micro_batch(numbers)
            with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = _loss(model, on_device(host.tokens), on_device(host.labels))
            (loss * batch.micro_samples / batch.global_samples).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        first += batch.global_samples
        return float(torch.stack(losses).mean())  # the step's one wait for the device

    return step


def fsdp2(recipe: Recipe) -> Step:
    """`fully_shard` of each decoder layer and of the root; gradients are reduced in the last micro-batch only."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = llama_config(recipe)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffer was on the meta device, too
    parameters = dict(model.named_parameters())
    decayed = set()
    with torch.no_grad():
        for name, value, decays in initial_weights(recipe):
            sharded = parameters[name]
            sharded.copy_(distribute_tensor(value, sharded.device_mesh, sharded.placements))
            decayed |= {name} if decays else set()
    optimizer = _adamw(recipe, parameters, decayed)

    def step(batches: list[tuple[Tensor, Tensor]]) -> float:
        total = 0.0
        for number, (tokens, labels) in enumerate(batches, start=1):
            model.set_requires_gradient_sync(number == len(batches))
            loss = _loss(model, tokens, labels)
            (loss / len(batches)).backward()
            total += loss.item() / len(batches)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def deepspeed_zero3(recipe: Recipe) -> Step:
    """`deepspeed.initialize` with torch's AdamW: nothing is compiled."""
    import deepspeed
    import torch.distributed as dist
    from transformers import LlamaForCausalLM

    from megacode.engine.zero import start_deepspeed

    start_deepspeed()  # without the shared-memory op, which is compiled at start
    config = _zero3_config(recipe, dist.get_world_size())
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = LlamaForCausalLM(llama_config(recipe))
    parameters = dict(model.named_parameters())
    decayed = set()
    for name, value, decays in initial_weights(recipe):
        with deepspeed.zero.GatheredParameters(parameters[name], modifier_rank=0):
            parameters[name].data.copy_(value)
        decayed |= {name} if decays else set()
    optimizer = _adamw(recipe, parameters, decayed)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(batches: list[tuple[Tensor, Tensor]]) -> float:
        total = 0.0
        for tokens, labels in batches:
            loss = _loss(engine, tokens, labels)
            engine.backward(loss)
            engine.step()
            total += loss.item() / len(batches)
        return total

    return step


def _zero3_config(recipe: Recipe, processes: int) -> dict[str, Any]:
    batch = recipe.batch
    return {
        "train_batch_size": batch.global_samples,
        "train_micro_batch_size_per_gpu": batch.micro_samples,
        "gradient_accumulation_steps": batch.global_samples // batch.micro_samples // processes,
        "gradient_clipping": recipe.optimizer.clip,
        "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def _loss(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood; labels are shifted already."""
    return model(input_ids=tokens, labels=labels, shift_labels=labels).loss


def _adamw(recipe: Recipe, parameters: dict[str, nn.Parameter], decayed: set[str]) -> Any:
    """torch's fused AdamW with the recipe's settings."""
    import torch

    section = recipe.optimizer
    groups = [
        {"params": [p for name, p in parameters.items() if name in decayed], "weight_decay": section.weight_decay},
        {"params": [p for name, p in parameters.items() if name not in decayed], "weight_decay": 0.0},
    ]
    betas = (section.beta1, section.beta2)
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=betas, eps=section.epsilon, fused=True)
