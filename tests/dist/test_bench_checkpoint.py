"""The benchmark of checkpoints, on a small model."""

from megacode.tools.bench import checkpoint


def test_it_saves_loads_and_measures(tmp_path):
    (row,) = checkpoint.measure(tmp_path, 2, [{"zero": 1}], hidden=96, times=1, device="cpu")
    assert row.num_bytes > row.share_bytes > 0.49 * row.num_bytes
    assert row.save_seconds >= row.copy_seconds + row.finish_seconds
    seconds = [getattr(row, f"{key}_seconds") for key in checkpoint.SECONDS]
    assert min(seconds) > 0
    assert row.extra_bytes < row.largest_bytes, "a tensor is received where it is written from"
    assert not list(tmp_path.iterdir())
    assert checkpoint.table([row]).count("\n") == 2
