"""Layouts: what fits a number of processes, and refusals with the mend before any process starts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.training import recipe

from megacode.errors import UserError
from megacode.parallel.stages import split_layers
from megacode.plan import layout as plan


def test_a_layout_takes_the_data_ranks_that_are_left():
    layout = plan.fit(recipe(parallel={"tensor": 2, "pipeline": 2}), 8)
    assert (layout.pipeline, layout.data, layout.tensor, layout.num_micro_batches) == (2, 2, 2, 4)
    assert layout.world_size == 8
    assert layout.stages == (range(2), range(2, 4))


def test_fewer_micro_batches_than_stages_fit():
    layout = plan.fit(recipe(parallel={"pipeline": 4}, batch={"global_samples": 2}), 4)
    assert layout.num_micro_batches == 2


@pytest.mark.parametrize(
    ("sections", "world_size", "message"),
    [
        ({"parallel": {"tensor": 2, "pipeline": 2}}, 6, r"6 processes .*parallel\.tensor \(2\).*multiple of 4"),
        ({"parallel": {"tensor": 3}}, 3, r"model\.heads \(4\) can't be split over parallel\.tensor \(3\)"),
        ({"parallel": {"tensor": 4}}, 4, r"model\.kv_heads \(2\) can't be split over parallel\.tensor \(4\)"),
        ({"parallel": {"tensor": 2}, "model": {"ffn": 49}}, 2, r"model\.ffn \(49\)"),
        ({"parallel": {"pipeline": 5}}, 5, r"batch\.global_samples|model\.layers \(4\) are fewer than .*\(5\)"),
        ({"batch": {"micro_samples": 3}}, 1, r"global_samples \(8\) is not a multiple .*next one up is 9"),
        ({"parallel": {"pipeline": 2, "virtual_stages": 3}}, 2, r"model\.layers \(4\) are fewer .*\(6\)"),
        (
            {"parallel": {"pipeline": 2, "virtual_stages": 2}, "batch": {"global_samples": 3}},
            2,
            r"interleaved stages need the 3 micro-batches .*multiple of parallel\.pipeline \(2\)",
        ),
        ({"parallel": {"tensor": 2}, "model": {"vocabulary": 8}}, 2, r"model\.vocabulary \(8\) leaves a tensor rank"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_mend(sections, world_size, message):
    with pytest.raises(UserError, match=message) as caught:
        plan.fit(recipe(**sections), world_size)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 60).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers))))
def test_stages_cover_all_layers_once_and_evenly(case):
    num_layers, num_stages = case
    stages = split_layers(num_layers, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert len(sizes) == num_stages
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes) or max(sizes) == min(sizes)


@given(st.integers(1, 100_000), st.integers(1, 16))
def test_vocabulary_rows_hold_the_vocabulary(vocabulary, tensor):
    rows = plan.vocabulary_rows(vocabulary, tensor)
    assert rows * tensor >= vocabulary
    assert rows * tensor - vocabulary < tensor * plan.VOCABULARY_MULTIPLE
