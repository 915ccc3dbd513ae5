"""One rank stops at a definite place: the verdict names it and what it is in, on four ranks as TP2 x PP2 mostly."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import traps
from support.launching import status, write_recipe
from support.stalling import run_ranks

STALL_SECONDS = 10
SETTINGS = (
    *("parallel.tensor=2", "parallel.zero=1", "deepspeed_config=null", "data.valid=null", "schedule.steps=4"),
    f"faults.stall_seconds={STALL_SECONDS}",
)
TWO = (*SETTINGS, "parallel.tensor=1", "parallel.pipeline=1")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("stalls"))


def lines(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


CASES = [
    (traps.in_a_tensor_collective, 1, "is stopped in all-reduce of tensor ranks 0-1 in backward of chunk 0", "ranks 0, 2-3"),
    (traps.in_a_transfer, 2, "is stopped in receive from rank 0 in forward of chunk 0, micro-batch 1 of step 2", "ranks 0-1, 3"),
    (traps.before_the_process_group, 3, "is stopped in rendezvous of world ranks 0-3 in starting the process group", "ranks 0-2"),
    (traps.in_the_engines_construction, 1, "is stopped in building the model", "ranks 0, 2-3"),
    (traps.in_the_data_loader, 2, "stands in reading data of step 2", "ranks 0-1, 3"),
    (traps.in_a_collective_of_deepspeed, 0, "is stopped in all-reduce of data ranks 0-1 in optimizer of step 1", "rank 1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def ends(recipe):
    """How the run of each trap ended. Each starts while those before it wait for their verdicts."""
    with ThreadPoolExecutor(len(CASES)) as pool:
        runs = {}
        for trap, rank, *_ in CASES:
            settings, size = (TWO, 2) if trap is traps.in_a_collective_of_deepspeed else (SETTINGS, 4)
            arguments = (recipe, f"run={recipe.parent / trap.__name__}", *settings)
            runs[trap] = pool.submit(run_ranks, *arguments, trap=trap, trapped=rank, world_size=size)
            time.sleep(STALL_SECONDS / 2)
        return {trap: run.result() for trap, run in runs.items()}


@pytest.mark.parametrize(("trap", "rank", "place", "others"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_rank_that_stops_is_named(recipe, ends, trap, rank, place, others):
    run, ended = recipe.parent / trap.__name__, ends[trap]
    size = len(ended.codes)
    assert ended.codes == [76] * size, ended.output
    told = status(run)
    assert (told["outcome"], told["rank"]) == ("failed", rank)
    blamed, waiting = told["message"].split("; ")
    assert f" s: rank {rank} (host " in blamed
    assert place in blamed
    assert waiting == f"{others} wait{'s' if size == 2 else ''} for it"
    (event,) = lines(run)
    assert (event["event"], event["ranks"], event["text"]) == ("stall", [rank], told["message"])
    assert ended.output.count("stalled for") == 1
    assert "another rank" not in ended.output
    stacks = {int(file.name[5:10]): file.read_text() for file in (run / "stacks").iterdir()}
    assert set(stacks) == set(range(size))
    assert all(f"rank {number}, host" in text and "main.py" in text for number, text in stacks.items())
    assert f"in {'<lambda>' if trap is traps.in_the_data_loader else 'stop_here'}" in stacks[rank].split("Now:")[0]


def test_a_slow_rank_is_named_while_the_run_goes_on(recipe):
    run = recipe.parent / "slow"
    settings = (*TWO, "logging.phases=true", "schedule.steps=45", "checkpoint.every_steps=100")
    ended = run_ranks(recipe, f"run={run}", *settings, trap=traps.slow_forward, trapped=1, world_size=2)
    assert ended.codes == [0, 0], ended.output
    (event,) = (line for line in lines(run) if line["event"] == "straggler")
    assert (event["rank"], event["phase"]) == (1, "forward")
    assert event["phase_seconds"] > 0.3 > event["phase_median"]  # two micro-batches; the median of two is their mean
    assert "is slow: " in event["text"]
    assert event["text"] in ended.output


@pytest.mark.parametrize(
    ("own", "trap", "message"),
    [
        ("parallel.pipeline=2", None, "parallel.pipeline is 2 on rank 1 and 1 on the others; give all hosts the same"),
        ("seed=0", traps.other_parameters, "torch.float64 on rank 1 and (616, 64) torch.float32 on the others of its data ranks"),
    ],
    ids=["recipe", "parameters"],
)  # fmt: skip
def test_ranks_that_differ_are_told_at_the_start(recipe, own, trap, message):
    run = recipe.parent / "differ"
    ended = run_ranks(recipe, f"run={run}", *TWO, trap=trap, trapped=1, world_size=2, own={1: (own,)})
    assert ended.codes == [2, 2], ended.output
    assert ended.output.count("error: ") == 1
    assert message in ended.output
    assert "Traceback" not in ended.output
    assert status(run)["outcome"] == "failed"
