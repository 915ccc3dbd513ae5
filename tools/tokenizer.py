"""megacode tokenizer: train a tokenizer, and check one."""

from pathlib import Path
from typing import Annotated

import typer

from megacode.data.preparing.corpus import EXCLUDE, SUFFIXES, Corpus, sum_bytes
from megacode.errors import UserError
from megacode.tools.prepare import Excludes, Inputs, TextField, fields_of, reading_bar

app = typer.Typer(help="Train a SentencePiece tokenizer with the infilling pieces, or check one.", no_args_is_help=True)


@app.command()
def train(
    inputs: Inputs,
    output: Annotated[Path, typer.Option(help="The model to write.")],
    pieces: Annotated[
        int, typer.Option(min=260, help="Rows of the base, 259 of them fixed; 16 more are appended.")
    ] = 4096,
    max_mib: Annotated[
        int, typer.Option(min=1, help="How much text to train on, in MiB; it is held in memory.")
    ] = 1024,
    suffix: Annotated[
        list[str] | None,
        typer.Option(help=f"End of the file names to take from folders; repeatable. Default: {SUFFIXES[0]}"),
    ] = None,
    exclude: Excludes = None,
    text_field: TextField = None,
) -> None:
    """Train a SentencePiece BPE model with byte fallback and Code Llama's sixteen rows behind it.

    Example: megacode tokenizer train src/ --output tokenizer.model --pieces 32000
    """
    from megacode.data.preparing.prepare import train_tokenizer
    from megacode.data.tokenizer import Tokenizer

    if output.exists():
        raise UserError(f"{output} is there already, and shards may depend on it; remove it, or name another --output")
    taken = tuple(suffix or ()), tuple(exclude or EXCLUDE)
    corpus = Corpus(inputs, *taken, fields=fields_of(inputs, text_field))
    with reading_bar("Reading", sum(map(sum_bytes, corpus.plan()))) as on_bytes:
        train_tokenizer(corpus, output, pieces, max_bytes=max_mib << 20, on_bytes=on_bytes)
    typer.echo(f"{output}: {Tokenizer(output).vocabulary:,} rows")


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A SentencePiece model.")],
    texts: Annotated[int, typer.Option(min=1, help="Random texts to try.")] = 10000,
) -> None:
    """Print a tokenizer's rows, and try whether text can become a special piece or gets lost.

    Exits with 1 if it can. Example: megacode tokenizer check tokenizer.model
    """
    from megacode.data.tokenizer import Tokenizer, find_fault

    tokenizer = Tokenizer(path)
    typer.echo(f"vocabulary: {tokenizer.vocabulary:,} rows")
    typer.echo(f"BOS {tokenizer.bos}, EOS {tokenizer.eos}")
    if tokenizer.has_infilling:
        ids = tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id
        typer.echo("infilling: PRE {}, SUF {}, MID {}, EOT {}".format(*ids))
    else:
        typer.echo("infilling: this tokenizer has no pieces for it")
    typer.echo(f"ids by {tokenizer.engine.name} ({tokenizer.engine.reason})")
    fault = find_fault(tokenizer, texts)
    typer.echo(
        fault
        or f"{texts:,} random texts that spell special pieces: none became one, all came back, ids as SentencePiece's"
    )
    if fault:
        raise typer.Exit(1)
