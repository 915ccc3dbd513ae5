"""`megacode data replay`: what it prints of a step is what the training got, whatever the layout and after a resume."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from support.loading import mesh
from support.shards import SOURCE, write_code
from typer.testing import CliRunner

from megacode import cli
from megacode.checkpoint.reader import Progress
from megacode.checkpoint.store import step_folder
from megacode.data.stream import IGNORE, ORDER, open_train, step_indices
from megacode.data.tokenizer import Tokenizer, train
from megacode.errors import UserError
from megacode.recipe import Recipe
from megacode.tools.data.replay import as_json, open_step, step_text
from megacode.train.loader import load

LENGTH = 128
VARIANTS = [("concatenate", False, 0.9), ("best_fit", True, 0.9), ("concatenate", True, 0.0)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    train([SOURCE], path, 700)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("corpus")
    write_code(folder / "code-0", tokenizer, seed=1)
    write_code(folder / "code-1", tokenizer, seed=2)
    write_code(folder / "chat", tokenizer, seed=3, spans=True)
    return folder


def recipe_of(run, corpus, tokenizer, variant=VARIANTS[0], **batch):
    packing, masks, rate = variant
    return Recipe.model_validate(
        {
            "run": str(run),
            "seed": 5,
            "model": {"preset": "nano"},
            "tokenizer": {"path": str(tokenizer.path)},
            "data": {
                "train": [
                    {"name": "code", "weight": 3.0, "shards": [f"{corpus}/code-*"]},
                    {"name": "chat", "weight": 1.0, "shards": [f"{corpus}/chat"]},
                ],
                "packing": packing, "document_masks": masks, "infilling_rate": rate,
            },
            "batch": {"global_samples": 8, "micro_samples": 2, "sequence_length": LENGTH, **batch},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"steps": 50, "warmup_steps": 1},
        }
    )  # fmt: skip


def write_run(run, recipe):
    run.mkdir(exist_ok=True)
    recipe.save(run / "recipe.yaml")
    return run


def write_checkpoint(recipe, tokenizer, step, next_sample):
    """What replay reads of one."""
    folder = step_folder(Path(recipe.run), step)
    folder.mkdir(parents=True)
    recipe.save(folder / "recipe.yaml")
    stream = open_train(recipe.data, tokenizer, LENGTH, recipe.seed)
    progress = Progress(
        step, next_sample, step, recipe.seed, LENGTH, stream.num_tokens, recipe.data.packing, ORDER, stream.facts()
    )
    (folder / "manifest.json").write_text(json.dumps({"progress": asdict(progress)}))


def replayed(run, step, sample=None):
    found = open_step(run, step)
    return as_json(found, found.choose(sample), tokens=True)["samples"]


def assert_is_what_ranks_got(recipe, tokenizer, samples, first, data, steps_before=0):
    """Compare with the loader of each data rank, which reads on from an earlier step if asked."""
    stream = open_train(recipe.data, tokenizer, LENGTH, recipe.seed)
    size, micro = recipe.batch.global_samples, recipe.batch.micro_samples
    begin = first - steps_before * size
    by_number = {sample["number"]: sample for sample in samples}
    assert list(by_number) == list(range(first, first + size))
    for rank in range(data):
        place = mesh(data=data, data_rank=rank)
        with load(recipe, place, stream, begin, first + size, workers=0) as loader:
            for _ in range(steps_before):
                loader.step()
            batches = loader.step()
        indices = step_indices(first, size, micro, data, rank)
        assert len(batches) == len(indices)
        for numbers, batch in zip(indices, batches, strict=True):
            for number, tokens, labels in zip(numbers, batch.tokens.tolist(), batch.labels.tolist(), strict=True):
                parts = by_number.pop(number)["parts"]
                ids = [token for part in parts for token in part["ids"]]
                loss = [flag for part in parts for flag in part["loss"]]
                assert tokens == ids[:-1]
                assert labels == [a if flag else IGNORE for a, flag in zip(ids[1:], loss[1:], strict=True)]
    assert not by_number


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("data", [1, 4])
def test_a_step_is_what_all_data_ranks_got(tmp_path, corpus, tokenizer, variant, data):
    recipe = recipe_of(tmp_path / "run", corpus, tokenizer, variant)
    run = write_run(tmp_path / "run", recipe)
    for step in (1, 7):
        samples = replayed(run, step)
        assert_is_what_ranks_got(recipe, tokenizer, samples, 8 * (step - 1), data, steps_before=min(step - 1, 3))
    assert {sample["source"] for sample in samples} == {"code", "chat"}


def test_after_a_resume_with_another_batch(tmp_path, corpus, tokenizer):
    """Steps 1 to 6 in batches of 8, with a checkpoint at 4; from there again, in batches of 12, to one at 6."""
    before = recipe_of(tmp_path / "run", corpus, tokenizer)
    after = recipe_of(tmp_path / "run", corpus, tokenizer, VARIANTS[2], global_samples=12)
    run = write_run(tmp_path / "run", after)
    write_checkpoint(before, tokenizer, 4, 32)
    write_checkpoint(after, tokenizer, 6, 56)
    for step, first, recipe in ((1, 0, before), (4, 24, before), (5, 32, after), (6, 44, after), (7, 56, after)):
        samples = replayed(run, step)
        assert_is_what_ranks_got(recipe, tokenizer, samples, first, 2)
        infilled = {part["kind"] for sample in samples for part in sample["parts"]} & {"PSM", "SPM"}
        assert (infilled != set()) == (recipe is before)


def test_parts_say_where_they_are_from(tmp_path, corpus, tokenizer):
    run = write_run(tmp_path / "run", recipe_of(tmp_path / "run", corpus, tokenizer, VARIANTS[1]))
    stream = open_train(recipe_of(run, corpus, tokenizer, VARIANTS[1]).data, tokenizer, LENGTH, 5)
    kinds = set()
    per_epoch = {name: cutter.per_epoch for name, cutter in zip(stream.sources, stream.cutters, strict=True)}
    epochs = {name: set() for name in per_epoch}
    for step in (1, 2, 3, 50):
        for sample in replayed(run, step):
            epochs[sample["source"]].add(sample["epoch"])
            assert sample["epoch"] == stream.mixture.locate(sample["number"])[1] // per_epoch[sample["source"]]
            place = 0
            for part in sample["parts"]:
                kinds.add(part["kind"])
                assert (part["place"], part["num_tokens"]) == (place, len(part["ids"]))
                place += part["num_tokens"]
                if part["kind"] == "padding":
                    continue
                source = stream.corpora[stream.sources.index(sample["source"])]
                shards = source.shard([str(prefix) for prefix in source.prefixes].index(part["shard"]))
                document = shards.document(part["document"]).tolist()
                if part["kind"] in ("PSM", "SPM"):
                    text = tokenizer.decode(document)
                    assert (part["start"], part["stop"]) == (0, len(document))
                    of = {role: joined(part["runs"], role) for role in ("prefix", "middle", "suffix")}
                    assert [of["prefix"], of["middle"], of["suffix"]] == cut(text, part["cuts"])
                else:
                    assert part["ids"] == document[part["start"] : part["stop"]]
                    assert joined(part["runs"], "text") == decoded(part["ids"], tokenizer)
                    assert (part["kind"] == "whole") == (part["num_tokens"] == len(document))
            assert place == LENGTH + 1
    assert kinds == {"whole", "cut", "PSM", "SPM", "padding"}
    assert min(map(len, epochs.values())) > 1


def joined(shown, role):
    return "".join(run["text"] for run in shown if run["role"] == role)


def cut(text, cuts):
    start, stop = cuts
    return [text[:start], text[start:stop], text[stop:]]


def decoded(ids, tokenizer):
    return tokenizer.decode(ids) if ids[0] == tokenizer.bos else tokenizer.decode_continuation(ids)


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["data", "replay", *map(str, arguments)])


def test_the_command(tmp_path, corpus, tokenizer):
    run = write_run(tmp_path / "run", recipe_of(tmp_path / "run", corpus, tokenizer))
    number = next(
        sample["number"] for sample in replayed(run, 2) if {"PSM", "SPM"} & {part["kind"] for part in sample["parts"]}
    )
    result = invoke(run, "--step", 2, "--sample", number, "--tokens", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.exception
    first, note, *_ = lines = result.stdout.splitlines()
    assert first == f"step 2 of 50: samples 8 to 15, 128 tokens each and the last label ({run}/recipe.yaml)"
    assert note.endswith("starts.jsonl does not tell what the shards were: they may be others now")
    (sample,) = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert f"sample {number}: source {sample['source']}, epoch {sample['epoch']}" in lines
    heads = [line.split()[:2] for line in lines if " of document " in line]
    assert heads == [[str(part["place"]), part["kind"]] for part in sample["parts"]]
    shown = ["".join(run["text"] for run in part["runs"]) for part in sample["parts"]]
    assert any(text.startswith("<s><PRE>") and text.endswith("<EOT></s>") for text in shown)
    assert all(f"\n{text}\n" in result.stdout for text in shown)
    assert "\x1b" not in result.stdout, "colours are for terminals"
    piped = invoke(run, "--step", 2, "--json", "-")
    assert json.loads(piped.stdout)["first_sample"] == 8
    assert "sample 15" in piped.stderr
    assert "ids" not in json.loads(piped.stdout)["samples"][0]["parts"][0]


def test_what_cannot_be_replayed(tmp_path, corpus, tokenizer):
    recipe = recipe_of(tmp_path / "run", corpus, tokenizer)
    with pytest.raises(UserError, match=r"run is no run folder \(it has no recipe\.yaml\)"):
        open_step(tmp_path / "run", 1)
    run = write_run(tmp_path / "run", recipe)
    for step in (0, -1, 51):
        with pytest.raises(
            UserError, match=rf"--step is {step} and schedule\.steps of .* is 50; name a step from 1 to 50"
        ):
            open_step(run, step)
    with pytest.raises(UserError, match="--sample is 16 and step 2 has samples 8 to 15"):
        open_step(run, 2).choose(16)
    assert isinstance(invoke(run, "--step", 0).exception, UserError)


@pytest.mark.parametrize("told_by", ["a checkpoint", "a start"])
def test_shards_that_have_changed(tmp_path, tokenizer, told_by):
    for name in ("code-0", "chat"):
        write_code(tmp_path / name, tokenizer)
    recipe = recipe_of(tmp_path / "run", tmp_path, tokenizer)
    run = write_run(tmp_path / "run", recipe)
    if told_by == "a checkpoint":
        write_checkpoint(recipe, tokenizer, 3, 24)
    else:
        facts = open_train(recipe.data, tokenizer, LENGTH, recipe.seed).facts()
        line = {"data": {"packing": "concatenate", "order": ORDER, "sources": facts}}
        (run / "starts.jsonl").write_text("{}\n" + json.dumps(line) + "\n")
    assert open_step(run, 1).unknown is None
    write_code(tmp_path / "code-0", tokenizer, seed=9)
    with pytest.raises(UserError, match=r"the shards of data\.train \(code\) have changed since") as caught:
        open_step(run, 1)
    assert "\n" not in str(caught.value)
    file = next(iter(run.glob("checkpoints/*/manifest.json")), run / "starts.jsonl")
    assert str(file) in str(caught.value)
    write_code(tmp_path / "code-0", tokenizer)
    open_step(run, 1)
    file.write_text(file.read_text().replace('"order": 2', '"order": 1'))
    with pytest.raises(UserError, match="by version 1 of their order and this megacode by 2"):
        open_step(run, 1)
    file.write_text(file.read_text().replace('"order": 1', '"order": 2').replace('"code"', '"other"'))
    with pytest.raises(UserError, match=r"data\.train has the sources code, chat and .* has other, chat"):
        open_step(run, 1)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"progress": 1}',
        '{"progress": {"step": 1, "next_sample": 8, "sources": [7]}}',
        '{"progress": {"step": "x"}}',
        "\xff",
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path, corpus, tokenizer, content):
    recipe = recipe_of(tmp_path / "run", corpus, tokenizer)
    run = write_run(tmp_path / "run", recipe)
    write_checkpoint(recipe, tokenizer, 3, 24)
    (step_folder(run, 3) / "manifest.json").write_text(content, encoding="latin-1")
    for step in (2, 4):
        with pytest.raises(UserError, match="cannot be read as a checkpoint's"):
            open_step(run, step)


def test_text_of_all_samples_without_tokens(tmp_path, corpus, tokenizer):
    run = write_run(tmp_path / "run", recipe_of(tmp_path / "run", corpus, tokenizer))
    found = open_step(run, 3)
    lines = list(step_text(found, found.choose(None), tokens=False))
    assert sum(line.startswith("\nsample ") for line in lines) == 8
    places = [int(line.split()[0]) for line in lines[2:] if not line.startswith("\n")]
    assert places.count(0) == 8
    assert np.max(places) <= LENGTH
