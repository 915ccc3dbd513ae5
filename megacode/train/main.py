"""From a recipe file to a finished run, on one rank: what launchers/train.py calls."""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from megacode import recipe
from megacode.checkpoint import store
from megacode.data.tokenizer import Tokenizer
from megacode.engine.config import deepspeed_config
from megacode.engine.zero import check_version, start_deepspeed
from megacode.errors import UserError
from megacode.parallel.mesh import build_mesh
from megacode.plan.layout import fit
from megacode.recipe import Recipe
from megacode.train import loop
from megacode.train.launch import Place, find_device, find_place, start_process_group
from megacode.train.metrics import fail_status, write_status


def main(arguments: list[str]) -> int:
    """Train; returns the process's exit code: 0 finished, 1 failed, 2 the user can mend it (said once a machine)."""
    options = _parse(arguments)
    place = Place(0, 0, 1, 1)
    try:
        place = find_place(options.local_rank)
        check_version()
        device = find_device(place)
        tokenizer, config = _load(options)
        layout = fit(config, place.world_size)
        deepspeed_config(config)
        stream, validation = loop.open_streams(config, tokenizer)
        loop.check_run_folder(config, stream.windows.num_tokens)
        _make_run_folder(Path(config.run), place)
    except UserError as error:
        return _refuse(error, place)
    try:
        timeout_seconds = config.faults.collective_timeout_seconds
        start_process_group(place, device, timeout_seconds)
        mesh = build_mesh(layout.pipeline, layout.data, layout.tensor, timeout_seconds=timeout_seconds)
        start_deepspeed()
        trainer = loop.start(config, layout, mesh, device, stream, validation)
        trainer.run()
        trainer.finish()
        dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:
        # A rank that raises must end at once and loudly: the others sit in collectives that it will never enter, and
        # the launcher ends them when this process is gone. Interpreter shutdown could wait for those collectives.
        try:
            fail_status(Path(config.run), place.rank, error, store.newest(Path(config.run)))
            if isinstance(error, UserError):
                os._exit(_refuse(error, place))
            print(f"rank {place.rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)
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
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    return parser.parse_intermixed_args(arguments)


def _load(options: argparse.Namespace) -> tuple[Tokenizer, Recipe]:
    """The tokenizer, and the recipe with overrides and with the tokenizer's vocabulary."""
    config = recipe.load(options.recipe, options.overrides)
    if options.deepspeed_config:
        config = config.model_copy(update={"deepspeed_config": options.deepspeed_config})
    tokenizer = Tokenizer(config.tokenizer.path)
    if config.model.vocabulary not in (None, tokenizer.vocabulary):
        raise UserError(
            f"model.vocabulary is {config.model.vocabulary} and the tokenizer {config.tokenizer.path} has "
            f"{tokenizer.vocabulary} rows; set model.vocabulary=null to take the tokenizer's, or name the other one"
        )
    model = config.model.model_copy(update={"vocabulary": tokenizer.vocabulary})
    return tokenizer, config.model_copy(update={"model": model})


def _make_run_folder(run: Path, place: Place) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        if place.rank == 0:
            write_status(run, "running")
    except OSError as error:
        raise UserError(f"run: cannot write the folder {run}: {error.strerror}; mend that or name another") from None


def _refuse(error: UserError, place: Place) -> int:
    """Say a user's mistake once on each machine; the exit code.

    All ranks find it, and the launcher ends all when the first is gone: the silent ones wait for the one that speaks.
    """
    if place.local_rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)
    return 2
