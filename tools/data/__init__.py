"""megacode data: look at shards, check them, and see what a training step saw."""

from pathlib import Path
from typing import Annotated

import typer

from megacode.tools.output import JsonFile, json_output

app = typer.Typer(help="Look at shards, check them, and see what a training step saw.", no_args_is_help=True)

TokenizerFile = Annotated[Path | None, typer.Option(help="The SentencePiece model that made the shards.")]


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    step: Annotated[int, typer.Option(help="Which optimizer step, from 1.")],
    sample: Annotated[int | None, typer.Option(help="Only the sample of this number, one of the step's.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also what the tokens say.")] = False,
    json: JsonFile = None,
) -> None:
    """Print what a step of a run was trained on: documents, how they were cut, and tokens.

    Example: megacode data replay runs/mine --step 1000 --sample 512123 --tokens
    """
    from megacode.tools.data.replay import as_json, open_step, step_text

    with json_output(json) as write:
        found = open_step(run, step)
        numbers = found.choose(sample)
        for line in step_text(found, numbers, tokens):
            print(line)
        if json is not None:
            write(as_json(found, numbers, tokens))


@app.command()
def inspect(
    prefix: Annotated[Path, typer.Argument(metavar="PREFIX", help="A shard: PREFIX.bin and PREFIX.idx.")],
    tokenizer: TokenizerFile = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents to show, and as many infilling documents.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Another seed shows others.")] = 0,
    sequence_length: Annotated[int, typer.Option(min=1, help="batch.sequence_length of the run to come.")] = 4096,
    infilling_rate: Annotated[float, typer.Option(min=0, max=1, help="data.infilling_rate of the run to come.")] = 0.9,
    json: JsonFile = None,
) -> None:
    """Print what is in a shard: counts, lengths, languages, what was left out, and some documents.

    Example: megacode data inspect data/train --tokenizer data/tokenizer.model
    """
    from megacode.tools.data.inspect import Question, look
    from megacode.tools.data.inspect_text import text

    with json_output(json) as write:
        found = look(Question(prefix, tokenizer, samples, seed, sequence_length, infilling_rate))
        for line in text(found):
            print(line)
        write(found.as_json())


@app.command()
def verify(
    prefixes: Annotated[list[Path], typer.Argument(metavar="PREFIX...", help="Shards.")],
    tokenizer: TokenizerFile = None,
    json: JsonFile = None,
) -> None:
    """Read shards whole and check every count, offset, id and checksum; what is wrong is named by its first byte.

    All are looked at. Exits with 1 if one is damaged. Example: megacode data verify data/train data/valid
    """
    from megacode.tools.data.verify import verify_all

    with json_output(json) as write:
        results = verify_all(prefixes, tokenizer)
        write(results)
    if any(result["problem"] for result in results):
        raise typer.Exit(1)
