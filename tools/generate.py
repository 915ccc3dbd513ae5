"""`megacode generate`: what an exported model writes, greedily, after a prompt or between a prefix and a suffix."""

from pathlib import Path
from typing import Annotated, Any

import typer

from megacode.errors import UserError


def complete(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The text that a model writes after `prompt`, until EOS.

    Args:
        model: a causal language model of transformers.
        tokenizer: the AutoTokenizer of an export.
        prompt: text; what spells a special piece stays text.
        max_new_tokens: most tokens to write.

    Raises:
        UserError: prompt and new tokens are more than the model's positions.
    """
    # Call by call: `split_special_tokens` keeps "</s>" in somebody's code from becoming the end of the document.
    ids = tokenizer(prompt, split_special_tokens=True).input_ids
    written = _greedy(model, ids, max_new_tokens, [tokenizer.eos_token_id])
    # Behind another token, the first written one keeps its leading space.
    before = tokenizer("a", add_special_tokens=False).input_ids
    return tokenizer.decode([*before, *written], skip_special_tokens=True)[1:]


def infill(model: Any, tokenizer: Any, prefix: str, suffix: str, max_new_tokens: int) -> str:
    """The text that a model writes between `prefix` and `suffix`, in prefix-suffix-middle order, until EOT.

    The ids are Code Llama's layout exactly, which transformers' tokenizers cannot make (the suffix goes without the
    dummy prefix): tokenizer.model beside the tokenizer makes them. Arguments and errors as of `complete`; a tokenizer
    without infilling pieces is one more.
    """
    from megacode.data.infill import infilling_prompt
    from megacode.data.tokenizer import Tokenizer

    pieces = Tokenizer(Path(tokenizer.name_or_path) / "tokenizer.model")
    ids = infilling_prompt(prefix, suffix, pieces)
    assert pieces.eot_id is not None
    return pieces.decode_continuation(_greedy(model, ids, max_new_tokens, [pieces.eot_id, pieces.eos]))


def generate(
    folder: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="An export of `megacode convert to-hf`.")],
    prompt: Annotated[str | None, typer.Option(help="Text to go on from.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Text before the gap.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Text after the gap.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 128,
) -> None:
    """Print what a model writes: after --prompt, or between --prefix and --suffix.

    Example: megacode generate exports/demo --prompt "def mean(values):"

    Example: megacode generate exports/demo --prefix "def mean(values):" --suffix "return total"
    """
    infilling = prefix is not None and suffix is not None
    if infilling == (prompt is not None) or (prefix is None) != (suffix is None):
        raise UserError("give either --prompt, or --prefix and --suffix")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; name a folder that `megacode convert to-hf` wrote")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if prompt is not None:
        typer.echo(complete(model, tokenizer, prompt, max_new_tokens))
    else:
        assert prefix is not None
        assert suffix is not None
        typer.echo(infill(model, tokenizer, prefix, suffix, max_new_tokens))


def _greedy(model: Any, ids: list[int], max_new_tokens: int, stops: list[int]) -> list[int]:
    """Ids written after `ids`, without the one that stopped it."""
    import torch

    most = model.config.max_position_embeddings
    if len(ids) + max_new_tokens > most:
        raise UserError(
            f"{len(ids)} prompt tokens and {max_new_tokens} new ones are beyond the model's {most}; ask less"
        )
    tokens = torch.tensor([ids], device=model.device)
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[-1],
    )
    written = output[0, len(ids) :].tolist()
    return written[:-1] if written and written[-1] in stops else written
