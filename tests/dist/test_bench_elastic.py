"""The benchmark of changing layouts, on two of them."""

import pytest

from megacode.tools.bench import elastic


def test_it_goes_from_each_layout_to_each():
    layouts = [(1, {"zero": 1}), (2, {"tensor": 2, "zero": 2})]
    rows = elastic.measure(4, layouts)
    assert len(rows) == 4
    assert all(row.differing_tensors == 0 for row in rows)
    same = [row.loss_difference for row in rows if row.source == row.target]
    assert same[0] == 0, "one process goes on bit for bit"
    assert max(row.loss_difference for row in rows) < 1e-5
    assert elastic.table(rows).count("\n") == 3


def test_a_changed_bit_is_an_error(monkeypatch):
    row = elastic.Row("a", "b", 1, 0.0)
    monkeypatch.setattr(elastic, "measure", lambda steps, layouts: [row])
    with pytest.raises(RuntimeError, match="tensors differ"):
        elastic.main(steps=2, json_file=None)
