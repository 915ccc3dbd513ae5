"""Small shards of real code."""

import argparse
import inspect
import random
import struct

from megacode.data.shards import ShardWriter
from megacode.data.spans import SpansWriter

SOURCE = inspect.getsource(argparse)


def write_code(prefix, tokenizer, num_documents=60, seed=0, longest=400, spans=False):
    """Pieces of source code of 1 to `longest` characters; with spans, the first tokens of every other one have no
    loss."""
    generator = random.Random(seed)
    sums = {"documents": 0, "tokens": 0, "bytes": 0}
    with (
        ShardWriter(prefix, tokenizer.vocabulary, tokenizer_sha256=tokenizer.sha256, source="argparse") as writer,
        SpansWriter(prefix, writer.facts) as spans_writer,
    ):
        for number in range(num_documents):
            start = generator.randrange(len(SOURCE) - longest)
            text = SOURCE[start : start + generator.randrange(1, longest)]
            ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
            writer.add_document(ids)
            spans_writer.add_document([(0, len(ids) // 2)] if spans and number % 2 else [])
            for key, count in (("documents", 1), ("tokens", len(ids)), ("bytes", len(text.encode()))):
                sums[key] += count
        writer.facts |= {"languages": {"python": sums}, "rejected": {}}
    return prefix


def write_megatron(prefix, documents):
    """As Megatron writes them: without PREFIX.json."""
    lengths = [len(document) for document in documents]
    count, offsets = len(documents), [2 * sum(lengths[:i]) for i in range(len(documents))]
    index = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, count, count + 1)
    index += struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *offsets, *range(count + 1))
    prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
    prefix.with_name(f"{prefix.name}.bin").write_bytes(
        b"".join(struct.pack(f"<{len(document)}H", *document) for document in documents)
    )
    return prefix
