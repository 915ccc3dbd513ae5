"""What a run may go on with, or begin from: a checkpoint of its model and tokenizer."""

from pathlib import Path

from megacode.checkpoint.reader import CheckpointReader
from megacode.errors import UserError
from megacode.recipe import Recipe


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
            mend = "change the one, or name another checkpoint.start_from"
            if not new_stage:
                mend = "change it back, or " + (
                    new_stage_from(checkpoint) if key == "rope_theta" else "name another `run`"
                )
            raise UserError(f"model.{key} is {here} and {checkpoint} has {there}; {mend}")
    if Path(recipe.tokenizer.path).read_bytes() != reader.tokenizer_path.read_bytes():
        key = "checkpoint.start_from" if new_stage else "`run` folder"
        raise UserError(f"tokenizer.path differs from the tokenizer of {checkpoint}; name that one, or another {key}")
    return reader


def new_stage_from(checkpoint: Path) -> str:
    """The mend where weights may go on but the run may not."""
    return f"start a new stage: another `run` folder, and checkpoint.start_from: {checkpoint}"
