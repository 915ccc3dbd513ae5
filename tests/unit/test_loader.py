"""megacode.train.loader: the same micro-batches whoever reads them, and what can go wrong in a worker."""

import os
import signal
import time
from itertools import islice

import pytest
import torch
from support.loading import LENGTH, Numbers, Truncated, mesh
from support.shards import write_megatron
from support.training import recipe

from megacode.data.stream import step_indices
from megacode.errors import UserError
from megacode.model.layers import IGNORE
from megacode.parallel.context import context_columns
from megacode.train.loader import OUTCOMES, Loader, Positions, count_documents, count_labels, load

STEPS = [[[0, 1], [4, 5]], [[8, 9], [12, 13]], [[16, 17], [20, 21]]]


PLAIN = Numbers()


def loader(stream=PLAIN, workers=0, steps=STEPS, context=(1, 0)):
    return Loader(stream, iter(steps), 2, workers, context)


def numbers(batches):
    """Of samples, micro-batch by micro-batch."""
    assert all((batch.tokens == batch.tokens[:, :1]).all() for batch in batches)
    return [batch.tokens[:, 0].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_steps_are_the_same_with_any_number_of_workers(tmp_path, workers):
    before = torch.random.get_rng_state()
    with loader(Numbers(log=tmp_path), workers) as made:
        assert [numbers(made.step()) for _ in STEPS] == STEPS
    assert torch.equal(torch.random.get_rng_state(), before)
    readers = {int(file.name) for file in tmp_path.iterdir()}
    assert len(readers) == max(1, workers)
    assert (os.getpid() in readers) == (workers == 0)
    assert not [reader for reader in readers - {os.getpid()} if os.path.exists(f"/proc/{reader}")]


def test_workers_read_ahead_but_not_without_end(tmp_path):
    """Two steps ahead: a slow sample of the fourth step is on its way when the second is asked for."""
    steps = [[[4 * step], [4 * step + 1]] for step in range(1000)]
    with loader(Numbers(), 1, steps=(each for each in steps)) as made:
        assert numbers(made.step()) == steps[0]
        assert len(list(islice(made._batches._sampler_iter, 1100))) >= 990 - 6


def test_a_damaged_shard_is_one_line_from_a_worker_too():
    for workers in (0, 1):
        with loader(Numbers(damaged=12), workers) as made:
            made.step()
            with pytest.raises(UserError, match=r"^the shard is damaged; prepare it again$"):
                made.step()


def test_a_worker_that_dies_is_an_error():
    with loader(Numbers(deadly=1), 1) as made, pytest.raises(RuntimeError, match=r"data\.workers: .* \(pid"):
        made.step()


def test_an_index_that_is_cut_short_is_named_as_what_may_have_ended_a_worker(tmp_path):
    write_megatron(tmp_path / "s", [[1] * LENGTH] * 500)
    with (
        loader(Truncated(tmp_path / "s"), 1) as made,
        pytest.raises(RuntimeError, match=r"\.idx or \.spans was cut short: .*\(pid"),
    ):
        made.step()


def test_signals_to_all_processes_of_a_job_do_not_end_workers(tmp_path):
    """SLURM sends --signal's signal to the workers as well."""
    with loader(Numbers(slow=9, log=tmp_path), 1) as made:
        made.step()
        (worker,) = [int(file.name) for file in tmp_path.iterdir()]
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
            os.kill(worker, number)
        assert numbers(made.step()) == STEPS[1]
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{worker}")


def test_a_rank_reads_its_samples_and_only_ends_read():
    config = recipe(batch={"global_samples": 8, "micro_samples": 2, "sequence_length": LENGTH})
    for stage in range(4):
        own = mesh(pipeline=4, pipeline_rank=stage, data=2, data_rank=1)
        stream = Numbers(damaged=10 if stage in (1, 2) else -1)
        with load(config, own, stream, 8, 24, workers=0) as made:
            for first in (8, 16):
                batches = made.step()
                assert len(batches) == 2
                if stage in (0, 3):
                    assert numbers(batches) == step_indices(first, 8, 2, 2, 1)
                for batch in batches:
                    assert batch.positions.tolist() == [list(range(LENGTH))] * 2
            with pytest.raises(StopIteration):
                made.step()
        masked = config.model_copy(update={"data": config.data.model_copy(update={"document_masks": True})})
        with load(masked, own, Numbers(damaged=10), 8, 16, workers=0) as made, pytest.raises(UserError):
            made.step()


def test_context_ranks_get_their_columns():
    for rank in (0, 1):
        with loader(context=(2, rank)) as made:
            batch = made.step()[0]
        assert batch.positions[0].tolist() == list(context_columns(LENGTH, 2, rank))
        with loader(Positions(LENGTH), context=(2, rank)) as blank:
            assert torch.equal(blank.step()[0].positions, batch.positions)


def test_labels_are_counted_once():
    with loader() as made:
        batches = made.step()
    batches[0].labels[0, :3] = IGNORE
    # Samples 0, 1, 4, 5: uneven ones are of infilling documents.
    assert count_labels(batches, mesh(), 4).tolist() == [2 * LENGTH - 3, 2 * LENGTH, 0, 0]
    for changes in ({"tensor_rank": 1, "tensor": 2}, {"pipeline": 2, "pipeline_rank": 0}):
        assert count_labels(batches, mesh(**changes), 4).tolist() == [0] * 4
    assert count_labels(batches, mesh(pipeline=2, pipeline_rank=1), 4).sum() == 4 * LENGTH - 3


def test_documents_are_counted_once():
    for workers in (0, 1):
        with loader(workers=workers, steps=[[[0, 1], [4, 5]], [[8, 9], [13, 15]]]) as made:
            made.step()
            assert made.documents["infilled"] == 2
            made.step()
    assert dict(zip(OUTCOMES, count_documents(made.documents, mesh()).tolist(), strict=True)) == {
        "uncut": 4, "infilled": 3, "irreversible": 0, "unfitting": 0, "spanned": 0,
    }  # fmt: skip
    for others in ({"tensor_rank": 1}, {"context_rank": 1}, {"pipeline": 2, "pipeline_rank": 1}):
        assert count_documents(made.documents, mesh(**others)).tolist() == [0] * len(OUTCOMES)
