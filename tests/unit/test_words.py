"""Layouts in words, models made smaller, and what is refused before anything starts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.training import recipe

from megacode.errors import UserError
from megacode.plan.cases import cases
from megacode.plan.layout import fit
from megacode.plan.scale import shrink
from megacode.plan.words import LayoutWords, parse
from megacode.recipe import ModelSection, ParallelSection, load

# ---- words


@pytest.mark.parametrize(
    ("text", "parallel", "data", "precision", "canonical"),
    [
        ("", {}, 1, "fp32", "zero1"),
        ("fp32 dp4", {}, 4, "fp32", "dp4 zero1"),
        ("zero3 pp2 tp2", {"tensor": 2, "pipeline": 2, "zero": 3}, 1, "fp32", "tp2 pp2 zero3"),
        ("pp4 v2 zero2 reduce=step", {"pipeline": 4, "virtual_stages": 2, "zero": 2, "reduce": "step"}, 1, "fp32",
         "pp4 v2 zero2 reduce=step"),
        ("tp2 sp cp2 dp3 bf16", {"tensor": 2, "sequence": True, "context": 2}, 3, "bf16", "tp2 dp3 cp2 zero1 sp bf16"),
        ("pp3 stages=1,2,1", {"pipeline": 3, "stages": [1, 2, 1]}, 1, "fp32", "pp3 zero1 stages=1,2,1"),
        ("pp2 stages=weighed recompute=full", {"pipeline": 2, "stages": "weighed", "recompute": "full"}, 1, "fp32",
         "pp2 zero1 recompute=full stages=weighed"),
        ("pp2 stages=even recompute=none", {"pipeline": 2}, 1, "fp32", "pp2 zero1"),
        ("zero3 gather=microbatch", {"zero": 3, "gather": "microbatch"}, 1, "fp32", "zero3 gather=microbatch"),
    ],
)  # fmt: skip
def test_words(text, parallel, data, precision, canonical):
    words = parse(text)
    assert words == LayoutWords(ParallelSection(**parallel), data, precision)
    assert str(words) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp2 qq3", r'^--layout "tp2 qq3": qq3 is no word of a layout; known are tpN ppN .* \(N from 1\)$'),
        ("tp0", "tp0 is no word"),
        ("tp", "tp is no word"),
        ("tp2x", "tp2x is no word"),
        ("zero4", "zero4 is no word"),
        ("gather=none", "gather=none is no word"),
        ("stages=1,,2", "stages=1,,2 is no word"),
        ("stages=0,2", "stages=0,2 is no word"),
        ("TP2", "TP2 is no word"),
        ("tp2 pp2 tp4", "tp2 and tp4 both say tensor; leave one out"),
        ("dp2 dp2", "dp2 and dp2 both say data"),
        ("zero1 zero2", "zero1 and zero2 both say zero"),
        ("bf16 fp32", "bf16 and fp32 both say precision"),
        ("v2", "virtual_stages above 1 needs pipeline above 1"),
        ("sp", "sequence: true needs tensor above 1"),
        ("zero2 gather=microbatch", "gather: microbatch needs zero: 3"),
        ("pp2 stages=1,2,3", "stages names 3 stages"),
    ],
)
def test_a_misspelt_layout_is_one_line_with_the_mend(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)


COUNTS = st.integers(1, 16)


@given(
    COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, st.sampled_from([1, 2, 3]), st.booleans(),
    st.sampled_from([None, "step", "microbatch"]), st.sampled_from([None, "step", "microbatch"]),
    st.sampled_from(["none", "selective", "full"]), st.sampled_from(["even", "weighed", "by hand"]),
    st.sampled_from(["fp32", "bf16"]),
)  # fmt: skip
def test_what_is_written_is_read_back(tp, pp, dp, cp, v, zero, sp, gather, reduce, recompute, stages, precision):
    values = {"tensor": tp, "pipeline": pp, "context": cp, "virtual_stages": v, "zero": zero, "sequence": sp}
    by_hand = [1 + n % 3 for n in range(pp * v)]
    values |= {"gather": gather, "reduce": reduce, "recompute": recompute}
    try:
        parallel = ParallelSection(**values, stages=by_hand if stages == "by hand" else stages)
    except ValueError:
        return
    words = LayoutWords(parallel, dp, precision)
    assert parse(str(words)) == words
    assert words.world_size == tp * pp * dp * cp


def test_a_layout_replaces_the_recipes_own():
    config = recipe(parallel={"tensor": 2, "zero": 3, "reduce": "step"}, deepspeed_config="ds_configs/zero3.json")
    changed = parse("pp2 zero3 bf16").of(config)
    assert (changed.parallel, changed.precision) == (ParallelSection(pipeline=2, zero=3), "bf16")
    assert changed.deepspeed_config == "ds_configs/zero3.json"
    assert parse("pp2 zero2").of(config).deepspeed_config == "ds_configs/zero2.json"
    elsewhere = config.model_copy(update={"deepspeed_config": "/elsewhere/ds.json"})
    assert parse("pp2 zero2").of(elsewhere).deepspeed_config is None
    assert parse("zero1").of(recipe(parallel={"zero": 3})).deepspeed_config is None


# ---- scale


def model(preset: str, changes: dict | None = None) -> ModelSection:
    values = ModelSection.model_validate({"preset": preset, "vocabulary": 32016}).model_dump()
    return ModelSection.model_validate({**values, **(changes or {})})


@pytest.mark.parametrize(
    ("preset", "factor", "layers", "hidden", "heads", "kv_heads", "ffn"),
    [
        ("code-llama-7b", 8, 4, 512, 4, 4, 1376),
        ("code-llama-7b", 1.5, 21, 2688, 21, 21, 7336),
        ("code-llama-34b", 8, 6, 1024, 8, 1, 2752),
        ("code-llama-34b", 64, 1, 128, 8, 1, 344),  # eight queries a key-value head stay; their heads get narrower
    ],
)
def test_a_model_of_the_same_structure(preset, factor, layers, hidden, heads, kv_heads, ffn):
    assert shrink(model(preset), factor) == {
        "layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "ffn": ffn,
    }  # fmt: skip


@pytest.mark.parametrize("preset", ["code-llama-7b", "code-llama-34b", "code-llama-70b", "nano", "micro"])
@pytest.mark.parametrize("layouts", [[""], ["tp2 pp2", "pp4"], ["tp2 pp2 v2"]], ids=str)
@given(factor=st.floats(1, 10_000))
def test_a_smaller_model_is_valid_and_fits_the_layouts(preset, layouts, factor):
    large, wanted = model(preset), [parse(text) for text in layouts]
    small = model(preset, shrink(large, factor, [words.parallel for words in wanted]))  # valid, or it would raise
    assert small.heads * large.kv_heads == large.heads * small.kv_heads
    for key in ("layers", "hidden", "heads", "kv_heads", "ffn"):
        assert 1 <= getattr(small, key) <= getattr(large, key)
    if small.head_dim not in (8, large.head_dim):
        assert small.hidden <= large.hidden / factor < small.hidden + 2 * small.heads
    for words in wanted:
        config = recipe(model=small.model_dump(), batch={"global_samples": 8 * words.data})
        fit(words.of(config), words.world_size)


def test_scale_1_is_the_model_itself():
    config = recipe(checkpoint={"start_from": "somewhere"})
    assert cases(config, [""])[0] == config
    assert cases(config, [""], 2)[0].checkpoint.start_from is None


# ---- cases


def test_cases():
    config = recipe(model={"preset": "code-llama-7b", "hidden": 4096, "ffn": 11008})
    small, found = cases(config, ["tp2 pp2 zero3", "pp4 dp2 stages=1,1,1,1"], 16)
    assert small.model.layers == 4
    assert math.isclose(small.model.hidden, 4096 / 16)
    assert [case.layout.world_size for case in found] == [4, 8]
    assert [case.layout.num_micro_batches for case in found] == [8, 4]
    assert found[0].recipe == found[0].words.of(small)


@pytest.mark.parametrize(
    ("layouts", "factor", "message"),
    [
        (["zero1", "tp3"], 1, r'^--layout "tp3": model\.heads \(4\) can\'t be split over parallel\.tensor \(3\)'),
        (["tp4"], 2, r'^--layout "tp4": model\.kv_heads \(2\) can\'t be split'),  # of the user's model
        (["pp8"], 1, r'^--layout "pp8": model\.layers \(4\) are fewer'),
        (["dp3"], 1, r"^--layout \"dp3\": batch\.global_samples \(8\) is not a multiple .* the next one up is 9$"),
        (["pp2 stages=2,1"], 1, r"add up to model\.layers \(4\)"),
        (["pp2 stages=2,2"], 2, r'^--layout "pp2 stages=2,2" at --scale 2: .* add up to model\.layers \(2\)'),
        (["pp3 v1 dp1 oops"], 1, "oops is no word"),
    ],
)
def test_a_layout_that_the_recipe_refuses(layouts, factor, message):
    with pytest.raises(UserError, match=message):
        cases(recipe(), layouts, factor)


def test_a_deepspeed_file_that_does_not_go_with_a_layout(tmp_path):
    file = tmp_path / "zero3.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(UserError, match=r'^--layout "zero3": .*zero_optimization\.stage is 2'):
        cases(recipe(parallel={"zero": 3}, deepspeed_config=str(file)), ["zero3"])


def test_the_demos_layouts():
    _, found = cases(load("launchers/recipes/demo.yaml"), ["tp2 pp2 dp2 zero3", "pp4 zero2"], 2)
    assert [case.recipe.deepspeed_config for case in found] == ["ds_configs/zero3.json", "ds_configs/zero2.json"]
