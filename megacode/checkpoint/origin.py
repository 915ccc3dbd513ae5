"""What a start needs before it trains: a tokenizer, a checkpoint to go on with or begin from, room for the next one."""

import hashlib
import shutil
from contextlib import suppress
from pathlib import Path

from megacode.checkpoint import keep
from megacode.checkpoint.earlier import mend
from megacode.checkpoint.reader import STATES, CheckpointReader
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError
from megacode.plan.model import num_parameters
from megacode.recipe import Recipe


def open_tokenizer(recipe: Recipe) -> tuple[Tokenizer, Recipe]:
    """The recipe's tokenizer, and the recipe with its vocabulary.

    Raises:
        UserError: the tokenizer is missing or damaged, or the recipe names another vocabulary.
    """
    tokenizer = Tokenizer(recipe.tokenizer.path)
    if recipe.model.vocabulary not in (None, tokenizer.vocabulary):
        raise UserError(
            f"model.vocabulary is {recipe.model.vocabulary} and the tokenizer {recipe.tokenizer.path} has "
            f"{tokenizer.vocabulary} rows; set model.vocabulary=null to take the tokenizer's, or name the other one"
        )
    model = recipe.model.model_copy(update={"vocabulary": tokenizer.vocabulary})
    return tokenizer, recipe.model_copy(update={"model": model})


def open_weights(recipe: Recipe, checkpoint: Path, new_stage: bool = False) -> CheckpointReader:
    """A checkpoint of the recipe's model and tokenizer.

    Args:
        recipe: with its vocabulary.
        checkpoint: a step folder, or what was converted.
        new_stage: its weights alone are taken, and rotary positions may have another base (Code Llama's long-context
            stage: Roziere et al. 2023, section 2.4).

    Raises:
        UserError: it is none, or one of another model or tokenizer; names the key that differs.
    """
    reader = CheckpointReader(checkpoint)
    free = {"preset", "init_std", "max_positions", *(["rope_theta"] if new_stage else [])}
    for key in type(reader.model).model_fields:
        here, there = getattr(recipe.model, key), getattr(reader.model, key)
        if here != there and key not in free:
            change = "change the one, or name another checkpoint.start_from"
            if not new_stage:
                change = "change it back, or " + (
                    new_stage_from(checkpoint) if key == "rope_theta" else "name another `run`"
                )
            raise UserError(f"model.{key} is {here} and {checkpoint} has {there}; {change}")
    try:
        theirs = reader.tokenizer_path.read_bytes()
    except OSError as error:
        raise UserError(f"{reader.tokenizer_path} cannot be read ({error.strerror}); {mend(checkpoint)}") from None
    named = reader.manifest["files"].get("tokenizer.model")
    if named is not None and named["sha256"] != hashlib.sha256(theirs).hexdigest():
        raise UserError(f"{reader.tokenizer_path} is damaged (its checksum differs); {mend(checkpoint)}")
    if Path(recipe.tokenizer.path).read_bytes() != theirs:
        key = "checkpoint.start_from" if new_stage else "`run` folder"
        raise UserError(f"tokenizer.path differs from the tokenizer of {checkpoint}; name that one, or another {key}")
    return reader


def new_stage_from(checkpoint: Path) -> str:
    """The mend where weights may go on but the run may not."""
    return f"start a new stage: another `run` folder, and checkpoint.start_from: {checkpoint}"


def check_disk(recipe: Recipe) -> None:
    """Refuse a run whose next checkpoint would not fit on the run folder's disk.

    What a killed run left of checkpoints counts as free: it goes before the first of this start.

    Raises:
        UserError: says how much is needed and how much is there.
    """
    needed = checkpoint_bytes(recipe)
    folder = Path(recipe.run).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free + sum(map(_num_bytes, keep.leftovers(Path(recipe.run))))
    if free < needed:
        raise UserError(
            f"run: a checkpoint takes {needed / 2**30:.2f} GiB and {folder} has {free / 2**30:.2f} GiB free; "
            f"make room, or name a `run` folder on another disk"
        )


def _num_bytes(folder: Path) -> int:
    """On the disk. A file may go meanwhile, when another rank of this start is ahead."""
    total = 0
    with suppress(FileNotFoundError):
        for file in folder.iterdir():
            total += 512 * file.lstat().st_blocks
    return total


def checkpoint_bytes(recipe: Recipe) -> int:
    """Size of a checkpoint: fp32 weights and moments, and the tokenizer."""
    return 4 * (1 + len(STATES)) * num_parameters(recipe.model) + Path(recipe.tokenizer.path).stat().st_size
