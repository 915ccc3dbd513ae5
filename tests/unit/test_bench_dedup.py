"""The benchmark of de-duplication runs and finds what it made."""

import json

from megacode.tools.bench.dedup import main, make, similarities


def test_it_runs(tmp_path, capsys):
    main(unique=40, near=6, exact=4, contaminated=5, rounds=1, json_file=tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["documents"] == 55
    assert found["found"]["exact"] == {"exact duplicate": 4}
    assert found["found"]["contaminated"] == {"contaminated": 5}
    assert set(found["found"]["near"]) <= {"near duplicate", "stays"}
    assert {"near signature", "stage sign", "stage search", "stage cluster"} <= set(found["MB/s"])
    assert min(found["MB/s"].values()) > 0
    assert "55 documents" in capsys.readouterr().out


def test_similarity_is_that_of_sets():
    words = [f"w{i}" for i in range(104)]  # 100 runs of 5
    half = [*words[:54], *(f"v{i}" for i in range(50))]  # of which it has 50, and 50 others
    assert similarities([" ".join(words), " ".join(half), "x"]) == [50 / 150, 50 / 150, 0.0]
    assert make(20, 2, 1, 1).kinds["contaminated"] == range(23, 24)
