"""The real launcher on two sources with best-fit packing: each step is trained on the samples that the stream says."""

import json

import numpy as np
from support.launching import NUM_STEPS, launch, metrics, status, write_recipe

from megacode.checkpoint.reader import CheckpointReader
from megacode.checkpoint.keep import newest
from megacode.data.stream import IGNORE, open_train
from megacode.data.tokenizer import Tokenizer
from megacode.recipe import load


def test_two_sources_with_a_stop_between(tmp_path):
    recipe = write_recipe(tmp_path)
    sources = (
        f"[{{name: one, weight: 3, shards: [{tmp_path}/trai*]}}, {{name: other, weight: 1, shards: [{tmp_path}/valid]}}]"
    )
    changes = [
        f"data.train={sources}", "data.packing=best_fit", "data.document_masks=true", "data.valid=null",
    ]  # fmt: skip
    config = load(recipe, changes)
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").write_text("3")
    stopped = launch(recipe, *changes, processes=2)
    assert (stopped.returncode, status(run)["step"]) == (75, 3), stopped.stderr[-3000:]
    done = launch(recipe, *changes, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "source one: 75.0000% of the samples" in stopped.stdout + done.stdout

    stream = open_train(config.data, Tokenizer(config.tokenizer.path), config.batch.sequence_length, config.seed)
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    ledger = {name: {"samples": 0, "labels": 0, "infilled_labels": 0} for name in stream.sources}
    for step, line in enumerate(lines):
        labels = dict.fromkeys(stream.sources, 0)
        for number in range(8 * step, 8 * step + 8):
            sample = stream.sample(number)
            name, count = stream.sources[sample.source], int((sample.labels != IGNORE).sum())
            labels[name] += count
            ledger[name]["samples"] += 1
            ledger[name]["labels"] += count
            ledger[name]["infilled_labels"] += int(np.count_nonzero(sample.infilled))
        assert line["labels_by_source"] == labels
        assert all(line["loss_by_source"][name] is not None for name in labels if labels[name])
    progress = CheckpointReader(newest(run)).progress
    assert progress.ledger == ledger
    assert sum(entry["samples"] for entry in ledger.values()) == NUM_STEPS * 8
    assert all(entry["infilled_labels"] > 0 for entry in ledger.values())
    start = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])["data"]
    assert start["packing"] == "best_fit"
    for name, epochs in zip(stream.sources, stream.epochs(NUM_STEPS * 8), strict=True):
        assert start["sources"][name]["epochs"] == epochs
        assert progress.sources[name] == stream.facts()[name]
