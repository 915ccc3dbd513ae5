"""What differs between ranks, in words."""

from megacode.train.agreement import _flat, difference


def test_nothing_differs():
    assert difference({0: {"a": 1}, 1: {"a": 1}}) is None


def test_one_rank_differs():
    facts = {rank: {"seed": 1, "optimizer.learning_rate": 0.1 if rank == 3 else 0.2} for rank in range(8)}
    assert difference(facts) == "optimizer.learning_rate is 0.1 on rank 3 and 0.2 on the others"


def test_a_host_differs():
    facts = {rank: {"run": "b" if 4 <= rank < 8 else "a"} for rank in range(12)}
    assert difference(facts) == "run is b on ranks 4-7 and a on the others"


def test_several_values():
    facts = {rank: {"a": "xxyzx"[rank]} for rank in range(5)}
    assert difference(facts) == "a is y on rank 2, z on rank 3 and x on the others"


def test_a_key_that_some_do_not_have():
    assert (
        difference({0: {"a": 1}, 1: {"a": 1, "b": None}, 2: {"a": 1}}) == "b is None on rank 1 and absent on the others"
    )


def test_sections_become_paths():
    assert _flat({"a": 1, "b": {"c": {"d": 2}, "e": []}, "f": {}}) == {"a": 1, "b.c.d": 2, "b.e": [], "f": {}}
