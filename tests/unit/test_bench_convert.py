"""megacode.tools.bench.convert: that it measures what it says, on little."""

import json

import pytest

from megacode.errors import UserError
from megacode.tools.bench import convert


def test_a_small_one(tmp_path, capsys):
    convert.main("nano", tmp_path / "big", "from-hf,from-meta")
    versions, copy, other, measured = map(json.loads, capsys.readouterr().out.splitlines())
    assert "torch" in versions["versions"]
    assert [each["direction"] for each in (copy, other, measured)] == ["dd", "from-hf", "from-meta"]
    assert measured["source_bytes"] > copy["bytes"] > 8_000_000
    assert 10**8 < measured["peak_memory_bytes"] < 4 * 2**30
    assert measured["seconds"] > measured["writing_seconds"] + measured["comparing_seconds"] > 0
    assert not (tmp_path / "big").exists()


@pytest.mark.parametrize("directions", ["to-hf", "from-hf,from-meta,to-hf", "from-hf,nowhere"])
def test_wrong_words(tmp_path, directions):
    with pytest.raises(UserError, match="--directions"):
        convert.main("nano", tmp_path / "big", directions)


def test_a_folder_that_is_there_is_kept(tmp_path):
    with pytest.raises(UserError, match="exists"):
        convert.main("nano", tmp_path, "from-hf")
    assert tmp_path.exists()
