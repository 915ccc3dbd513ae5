"""`megacode prepare --executor slurm` does what it does on this machine, to the byte, and tells what failed."""

import gzip
import re
from pathlib import Path

import pytest
import typer
from support.preparing import UNIT_BYTES, benchmark, write_corpus
from support.trees import small_model
from typer.testing import CliRunner

from megacode.errors import UserError
from megacode.tools.prepare import prepare

ROOT = Path(__file__).parents[2]
APP = typer.Typer()
APP.command()(prepare)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.fixture
def cluster(clusters, monkeypatch):
    """More cores than there are, so that tasks need not wait for one another's start."""
    cluster = clusters(2, 8)
    for name, value in {**cluster.environment, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("megacode.data.preparing.slurm.POLL_SECONDS", 0.3)
    monkeypatch.setattr("megacode.data.preparing.corpus.UNIT_BYTES", UNIT_BYTES)
    yield cluster
    cluster.wait()


def run(*arguments):
    """What the command prints; its error, if it is the user's."""
    done = CliRunner().invoke(APP, list(map(str, arguments)))
    if isinstance(done.exception, UserError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_bytes_are_those_of_this_machine(cluster, tmp_path, model):
    write_corpus(tmp_path / "d.jsonl")
    options = [tmp_path / "d.jsonl", "--tokenizer", model, "--dedup", "near", "--decontaminate", benchmark(tmp_path)]
    options += ["--valid-fraction", 0.1]
    here, there = tmp_path / "here" / "s", tmp_path / "there" / "s"
    local = run(*options, "--output", here, "--valid", f"{here}-valid", "--workers", 1)

    command = [*options, "--output", there, "--valid", f"{there}-valid", "--executor", "slurm", "--memory-gb", 1]
    command += ["--partition", "main", "--time", "10", "--workers", 16]
    sent = run(*command)
    jobs = re.findall(r"job (\d+): (\w+), (\d+) tasks", sent)
    assert [name for _, name, _ in jobs] == ["sign", "search", "cluster", "tokenize", "merge"]
    assert [int(tasks) for _, name, tasks in jobs if name in ("search", "cluster", "merge")] == [15, 1, 1]
    assert "--wait waits for the end" in sent

    waited = run(*command, "--wait")
    cluster.wait()
    assert re.findall(r"job (\d+): (\w+), (\d+) tasks", waited) == jobs, "jobs that are in the queue are not sent again"
    assert waited.split("\n", 5)[5].replace(str(there), str(here)) == local
    for side in ("s", "s-valid"):
        for end in (".bin", ".idx", ".json"):
            assert (there.parent / f"{side}{end}").read_bytes() == (here.parent / f"{side}{end}").read_bytes()
    assert Path(f"{there}.rejects.jsonl").read_bytes() == Path(f"{here}.rejects.jsonl").read_bytes()
    assert sorted(path.name for path in there.parent.glob("s.*/")) == ["s.slurm"]
    assert run(*command, "--wait").replace(str(there), str(here)) == local, "what is done is told again"


def test_a_task_that_fails_is_told(cluster, tmp_path, model):
    good = gzip.compress(b'{"text": "x = 1"}\n' * 1000)
    (tmp_path / "good.jsonl.gz").write_bytes(good)
    (tmp_path / "bad.jsonl.gz").write_bytes(good[:-12])
    options = ["--tokenizer", model, "--output", tmp_path / "s", "--executor", "slurm", "--wait"]
    with pytest.raises(UserError) as told:
        run(tmp_path / "good.jsonl.gz", tmp_path / "bad.jsonl.gz", *options)
    message = str(told.value)
    assert re.match(r"the stage tokenize failed in array task \d+: .*bad\.jsonl\.gz is a damaged gzip file", message)
    log = re.search(r"its log is (\S+\.out);", message)
    assert "damaged gzip file" in Path(log[1]).read_text()
    assert not (tmp_path / "s.bin").exists()
    assert cluster.queued() == [], "what comes after goes with it"


def test_jobs_that_were_cancelled_are_told_and_go_on(cluster, tmp_path, model):
    (tmp_path / "d.jsonl").write_text('{"text": "x = 1"}\n' * 3)
    command = [tmp_path / "d.jsonl", "--tokenizer", model, "--output", tmp_path / "s", "--executor", "slurm"]
    cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        jobs = re.findall(r"job (\d+)", run(*command))
        cluster.run("scancel", jobs[0])
    finally:
        cluster.run("scontrol", "update", "PartitionName=main", "State=UP")
    cluster.wait()
    assert len(jobs) == 2
    assert "s: 3 documents" in run(*command, "--wait")
    assert (tmp_path / "s.bin").exists()


def test_refusals(cluster, tmp_path, model, monkeypatch):
    (tmp_path / "d.jsonl").write_text('{"text": "x = 1"}\n')
    command = [tmp_path / "d.jsonl", "--tokenizer", model, "--output", tmp_path / "s"]
    with pytest.raises(UserError, match=r"sbatch refused: .*invalid partition specified: nowhere"):
        run(*command, "--executor", "slurm", "--partition", "nowhere")
    with pytest.raises(UserError, match="--partition needs --executor slurm"):
        run(*command, "--partition", "main")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with pytest.raises(UserError, match="sends jobs, which a job must not"):
        run(*command, "--executor", "slurm")
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs sbatch, squeue, scancel, scontrol on PATH"):
        run(*command, "--executor", "slurm")
    assert cluster.queued() == []
