"""Recipes: bases, overrides, presets, and mistakes that name the key and the mend."""

from pathlib import Path

import pytest
import yaml

from megacode.errors import UserError
from megacode.recipe import Recipe, load

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(
        "run: here\nmodel: {preset: nano}\ntokenizer: {path: t}\ndata: {train: d}\n"
        "batch: {global_samples: 8, micro_samples: 2, sequence_length: 16}\n"
        "optimizer: {learning_rate: 3e-4}\nschedule: {steps: 10, warmup_steps: 2}\n"
    )
    return path


def test_numbers_without_a_dot_are_numbers(base):
    assert load(base).optimizer.learning_rate == 3e-4
    assert load(base, ["optimizer.learning_rate=1e-3"]).optimizer.learning_rate == 1e-3


def test_a_variant_says_what_differs(base, tmp_path):
    variant = tmp_path / "variant.yaml"
    variant.write_text("base: base.yaml\nschedule: {steps: 20}\nmodel: {kv_heads: 4}\n")
    recipe = load(variant, ["run=there", "parallel.zero=3"])
    assert (recipe.schedule.steps, recipe.schedule.warmup_steps) == (20, 2)
    assert (recipe.model.kv_heads, recipe.model.layers) == (4, 4)
    assert (recipe.run, recipe.parallel.zero) == ("there", 3)


def test_an_empty_section_is_its_defaults(base):
    base.write_text(base.read_text() + "checkpoint:\nlogging:\n")
    assert load(base, ["checkpoint.every_steps=7"]).checkpoint.every_steps == 7


def test_a_variant_takes_back_what_its_base_says(base, tmp_path):
    base.write_text(base.read_text() + "deepspeed_config: ds.json\n")
    variant = tmp_path / "variant.yaml"
    variant.write_text("base: base.yaml\ndeepspeed_config: null\nmodel:\n")
    assert load(base).deepspeed_config == "ds.json"
    assert load(variant).deepspeed_config is None
    assert load(variant).model == load(base).model


def test_a_base_that_leads_back_is_refused(base):
    base.write_text("base: base.yaml\n")
    with pytest.raises(UserError, match="leads back"):
        load(base)


def test_a_saved_recipe_loads_back_equal(base, tmp_path):
    recipe = load(base, ["parallel.zero=2", "model.vocabulary=100"])
    recipe.save(tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == recipe


def test_every_field_has_a_help_text():
    def check(section):
        for name, field in section.model_fields.items():
            nested = isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields")
            assert nested or field.description or name == "preset", f"{section.__name__}.{name}"
            if nested:
                check(field.annotation)

    check(Recipe)


def test_shipped_recipes_load():
    paths = sorted((ROOT / "launchers" / "recipes").glob("*.yaml"))
    assert paths
    for path in paths:
        load(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1", r"optimizer\.learning_rat: unknown key; did you mean learning_rate\?"),
        ("modle.layers=1", r"modle: unknown key; did you mean model\?"),
        ("model.preset=giant", "preset 'giant' is unknown; known are code-llama-7b"),
        ("model.heads=3", r"model: hidden \(64\) must be a multiple of heads \(3\)"),
        ("model.kv_heads=3", r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        ("batch.micro_samples=two", r"batch\.micro_samples: .*integer, not 'two'"),
        ("batch.micro_samples=1.5", r"batch\.micro_samples: .*integer, not 1\.5"),
        ("schedule.steps=0", r"schedule\.steps: .*greater than 0, not 0"),
        (
            "faults.stall_seconds=600",
            r"faults: stall_seconds \(600\) must be below collective_timeout_seconds \(600\), which ends the run",
        ),
        ("schedule.warmup_steps=10", r"warmup_steps \(10\) must be below steps \(10\)"),
        ("precision=fp16", r"precision: .*'bf16' or 'fp32', not 'fp16'"),
        ("parallel.zero=0", r"parallel\.zero: .*1, 2 or 3, not 0"),
        ("parallel.gather=step", None),
        ("parallel.gather=microbatch", r"gather: microbatch needs zero: 3, and zero is 1"),
        ("parallel.reduce=microbatch", r"reduce: microbatch needs zero: 2 or 3"),
        ("parallel.virtual_stages=2", r"virtual_stages above 1 needs pipeline above 1"),
        ("parallel.stages=[1, 1.5]", r"parallel\.stages: must be even, weighed, or whole numbers .*; not \[1, 1\.5\]"),
        ("parallel.stages=odd", r"parallel\.stages: must be even, weighed, or whole numbers .*; not 'odd'"),
        ("parallel.stages=[true]", r"parallel\.stages: must be even, .*; not \[True\]"),
        ("parallel.stages=[1, 3]", r"parallel: stages names 2 stages and there are pipeline x virtual_stages = 1"),
        ("parallel=3", r"parallel: is a section; give it keys of its own, not 3"),
        ("model={preset: nano, preset: nano}", r"nano}': the key `preset` stands twice; leave one out$"),
        ("batch.sequence_length=4096", r"\.yaml: batch\.sequence_length \(4096\) is beyond model\.max_positions"),
        ("run", "is not key.path=value"),
        ("optimizer.learning_rate=.inf", r"optimizer\.learning_rate: .*finite number"),
        ("model.preset=[1]", r"preset \[1\] is unknown"),
        ("run.folder=x", "run is a value, not a section"),
    ],
)
def test_mistakes_name_the_key_and_the_mend(base, override, message):
    if message is None:
        load(base, [override])
        return
    with pytest.raises(UserError, match=message) as caught:
        load(base, [override])
    assert "\n" not in str(caught.value)


def keys(section=Recipe, path=()):
    for name, field in section.model_fields.items():
        nested = isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields")
        yield from keys(field.annotation, (*path, name)) if nested else [".".join((*path, name))]


@pytest.mark.parametrize("key", keys())
def test_a_value_of_the_wrong_kind_is_told_under_its_key(base, key):
    for value in ("{x: 1}", "[1, 1.5]"):
        with pytest.raises(UserError) as caught:
            load(base, [f"{key}={value}"])
        where, _, message = str(caught.value).removeprefix(f"{base}: ").partition(": ")
        # A preset is filled in by its section; a number in a list is told with its place.
        assert where in (key, f"{key}.1", key.removesuffix(".preset")), str(caught.value)
        assert "\n" not in message


def test_files_that_are_no_recipe(tmp_path, base):
    with pytest.raises(UserError, match=r"cannot read the recipe .*missing\.yaml: No such file"):
        load(tmp_path / "missing.yaml")
    for text, message in (
        ("a: [", "is not YAML"),
        ("a: [", r"base\.yaml is not YAML: .* in line 1, column 5"),
        ("a: 1\nb: 3\na: 2", r"base\.yaml, line 3: the key `a` stands twice, the first time in line 1; leave one out$"),
        ("a:\n  {b: 1, c: 2,\n   b: 1}", r"base\.yaml, line 3: the key `b` stands twice, the first time in line 2"),
        ("- 1", "holds no recipe"),
        ("", "holds no recipe"),
    ):
        base.write_text(text)
        with pytest.raises(UserError, match=message):
            load(base)
    values = {"run": "x"}
    base.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"model: is missing, so are tokenizer, .*schedule.*; give each a value"):
        load(base)


SOURCES = "[{name: code, weight: 85, shards: [c/*]}, {name: text, weight: 15.5, shards: [t, u]}]"


def test_sources(base, tmp_path):
    recipe = load(base, [f"data.train={SOURCES}"])
    assert [(s.name, s.weight, s.shards) for s in recipe.data.train] == [
        ("code", 85, ["c/*"]), ("text", 15.5, ["t", "u"]),
    ]  # fmt: skip
    recipe.save(tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == recipe


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("7", "data.train: must be a prefix, or a list of sources with name, weight and shards; not 7"),
        ("[]", r"data.train: needs sources with names that differ, not \[\]"),
        ("[{name: a, weight: 1, shards: [c]}, {name: a, weight: 1, shards: [d]}]", "names that differ, not .'a', 'a'"),
        ("[{name: a, weight: 0, shards: [c]}]", "data.train: source 0: weight: .* greater than 0, not 0"),
        ("[{name: a, weight: 1}]", "source 0: shards: is missing; give it a value"),
        ("[{name: a, weight: 1, shards: []}]", r"source 0: shards: .* at least 1 item"),
        ("[{name: a, weigth: 1, weight: 1, shards: [c]}]", "source 0: weigth: unknown key; did you mean weight"),
        ("[a, b]", "source 0: is a section|source 0: .*not 'a'"),
    ],
)
def test_mistakes_in_sources(base, train, message):
    with pytest.raises(UserError, match=message):
        load(base, [f"data.train={train}"])


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "launchers/recipes").glob("*.yaml")))
def test_recipes_that_come_along(name):
    recipe = load(ROOT / f"launchers/recipes/{name}.yaml")
    assert recipe.run.startswith("runs/")


def test_mixtures_of_table_1():
    shares = {}
    for name in ("code_llama_7b", "code_llama_7b_python"):
        train = load(ROOT / f"launchers/recipes/{name}.yaml").data.train
        shares[name] = {source.name: source.weight for source in train}
        assert sum(shares[name].values()) == 100
    assert list(shares["code_llama_7b"].values()) == [85, 8, 7]
    assert list(shares["code_llama_7b_python"].values()) == [75, 10, 10, 5]
