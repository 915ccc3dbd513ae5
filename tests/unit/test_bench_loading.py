"""megacode.tools.bench.loading: that it measures what it says, on little."""

import argparse
import inspect
import json

import pytest

from megacode.data.shards import ShardWriter
from megacode.data.tokenizer import Tokenizer, train
from megacode.tools.bench import loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    train([inspect.getsource(argparse)], folder / "tokenizer.model", 800)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder / "tokenizer.model")


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_a_start_on_many_shards(folder, tokenizer, packing, capsys):
    """50 shards of a billion tokens each, of which a start reads next to nothing."""
    prefixes = loading.write_sparse(folder / "huge", tokenizer, 50, loading.long_lengths(50, 50 * 10**9))
    assert sum(prefix.with_suffix(".bin").stat().st_size for prefix in prefixes) == 10**11
    assert sum(prefix.with_suffix(".bin").stat().st_blocks for prefix in prefixes) < 1000
    loading.start(folder, "huge", packing, loading.FAR_STEP)
    figures = json.loads(capsys.readouterr().out)
    assert figures["peak_bytes"] - figures["peak_bytes_before"] < 50 * 2**20
    assert figures["tokens_per_second"] > 0


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("rate", [0.0, 0.9])
def test_figures_of_a_stream(tmp_path, tokenizer, packing, rate):
    lines = [line for line in inspect.getsource(argparse).splitlines(keepends=True) if line.strip()]
    with ShardWriter(tmp_path / "s", tokenizer.vocabulary, tokenizer_sha256=tokenizer.sha256) as writer:
        for first in range(0, len(lines), 5):
            ids = tokenizer.encode("".join(lines[first : first + 5]))
            writer.add_document([tokenizer.bos, *ids, tokenizer.eos])
    row = loading.stream_figures(tmp_path / "s", tokenizer, packing, rate, repetitions=1)
    assert row["tokens_per_second"] > 0
    assert row["samples_of_all_tokens"] == pytest.approx(
        row["documents"] * row["mean_length"] / loading.LENGTH, rel=0.01
    )
    assert (row["effective_rate"] > 0.6) == (rate > 0)
    assert (row["padding"] > 0) == (packing == "best_fit")


def test_figures_of_planning():
    row = loading.planning_figures(repetitions=1)
    assert -0.001 < row["more_than_concatenated"] < 0.001
    assert row["more_than_concatenated"] < row["more_with_reserve"] < 0.01
    assert min(row["count_documents_per_second"], row["plan_documents_per_second"]) > 0


def test_figures_of_counting(tmp_path, folder, tokenizer):
    row = loading.counting_figures(folder, tokenizer, 3000, processes=2)
    assert (row["documents"], row["files"], len(row["first_at_once"])) == (3000, 3, 2)
    assert 500 < row["tokens"] / 3000 < 2000
    assert not (folder / "dense").exists()
    loading.print_counting(row)
