"""From a recipe file to a finished run, on one rank: what launchers/train.py calls."""

import argparse
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megacode import plan, recipe
from megacode.checkpoint import store
from megacode.data.tokenizer import Tokenizer
from megacode.engine.config import deepspeed_config
from megacode.engine.zero import start_deepspeed
from megacode.errors import UserError
from megacode.parallel.mesh import build_mesh
from megacode.recipe import Recipe
from megacode.train import loop
from megacode.train.metrics import write_status


def main(arguments: list[str]) -> int:
    """Train; returns the process's exit code: 0 finished, 1 failed, 2 the user can mend it (said on rank 0)."""
    options = _parse(arguments)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config = _load(options)
        layout = plan.layout(config, world_size)
        deepspeed_config(config)
        loop.check_run_folder(config)
        stream, validation = loop.open_streams(config, Tokenizer(config.tokenizer.path))
        Path(config.run).mkdir(parents=True, exist_ok=True)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        device = _start_process_group(options.local_rank, config.faults.collective_timeout_seconds)
        mesh = build_mesh(
            layout.pipeline, layout.data, layout.tensor, timeout_seconds=config.faults.collective_timeout_seconds
        )
        start_deepspeed()
        trainer = loop.start(config, layout, mesh, device, stream, validation)
        trainer.run()
        trainer.finish()
        dist.destroy_process_group()
    except Exception as error:
        # A rank that raises must end at once and loudly: the others sit in collectives that it will never enter, and
        # the launcher ends them when this process is gone. Interpreter shutdown could wait for those collectives.
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        run = Path(config.run)
        message = f"{type(error).__name__}: {error}"
        write_status(run, "failed", rank=rank, message=message, checkpoint=str(store.newest(run)))
        os._exit(2 if isinstance(error, UserError) else 1)
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launchers/train.py",
        description="Train. Started by `deepspeed`, `torchrun` or `srun`.",
        epilog="example: deepspeed --num_gpus 8 launchers/train.py launchers/recipes/demo.yaml schedule.steps=100",
    )
    parser.add_argument("recipe", help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace a value of the recipe")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON file; replaces the recipe's deepspeed_config")
    parser.add_argument(
        "--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", "0")), help="given by deepspeed"
    )
    return parser.parse_intermixed_args(arguments)


def _load(options: argparse.Namespace) -> Recipe:
    """The recipe with overrides, and with the vocabulary of its tokenizer."""
    overrides = list(options.overrides)
    if options.deepspeed_config:
        overrides.append(f"deepspeed_config={options.deepspeed_config}")
    config = recipe.load(options.recipe, overrides)
    vocabulary = Tokenizer(config.tokenizer.path).vocabulary
    if config.model.vocabulary not in (None, vocabulary):
        raise UserError(
            f"model.vocabulary is {config.model.vocabulary} and the tokenizer {config.tokenizer.path} has {vocabulary} "
            f"rows; leave model.vocabulary out, or name the other tokenizer"
        )
    return recipe.load(options.recipe, [*overrides, f"model.vocabulary={vocabulary}"])


def _start_process_group(local_rank: int, timeout_seconds: float) -> torch.device:
    """The device of this rank, with torch.distributed up: NCCL where there are GPUs, else gloo."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in alone.items():  # a single process may be started by hand, without a launcher
        os.environ.setdefault(name, value)
    timeout = timedelta(seconds=timeout_seconds)
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
        return device
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        # gloo guesses an interface from the host's name, and at random waits for ever on a host with odd ones.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", timeout=timeout)
    return torch.device("cpu")
