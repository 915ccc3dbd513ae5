"""One turn of a contestant of `bench.prepare`, in a process of its own.

`python -m megacode.tools.bench.prepare_peers NAME WORKERS TOKENIZER CORPUS FOLDER`: its last line is the number of
tokens (0 where the shards tell).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def megacode(workers: int, tokenizer: Path, corpus: Path, folder: Path) -> int:
    """`megacode prepare`, without its command line."""
    from megacode.data.preparing.corpus import Corpus
    from megacode.data.preparing.prepare import plan, prepare

    prepare(plan(Corpus([corpus], suffixes=(".jsonl",)), tokenizer, folder / "out"), workers)
    return 0


def sentencepiece(workers: int, tokenizer: Path, corpus: Path, folder: Path) -> int:
    """SentencePiece's ids of each text, and no more."""
    import orjson
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(tokenizer))
    tokens = 0
    for path in sorted(corpus.iterdir()):
        with path.open("rb") as file:
            tokens += sum(len(processor.encode(orjson.loads(line)["text"])) for line in file)
    return tokens


def datatrove(workers: int, tokenizer: Path, corpus: Path, folder: Path) -> int:
    """datatrove's pipeline from JSON lines to Megatron's format."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    from megacode.data.shards import Shards
    from megacode.data.tokenizer import Tokenizer
    from megacode.data.tokenizer_json import tokenizer_json

    model = Tokenizer(tokenizer, oracle=True)
    path = folder / "tokenizer.json"
    path.write_text(tokenizer_json(model.model, dummy_prefix=True), encoding="utf-8")
    # How tokenizer_json calls a piece that no text may become.
    writer = MegatronDocumentTokenizer(str(folder), "out", str(path), eos_token=f"control {model.eos}")
    steps = [JsonlReader(str(corpus)), writer]
    LocalPipelineExecutor(steps, tasks=workers, workers=workers, logging_dir=str(folder / "logs")).run()
    shards = [Shards(str(file).removesuffix(".idx")) for file in folder.glob("out*.idx")]
    return sum(shard.num_tokens - shard.num_documents for shard in shards)


CONTESTANTS: dict[str, Callable[[int, Path, Path, Path], int]] = {
    "megacode": megacode,
    "sentencepiece": sentencepiece,
    "datatrove": datatrove,
}

if __name__ == "__main__":
    name, number, *paths = sys.argv[1:]
    print(CONTESTANTS[name](int(number), *map(Path, paths)))
