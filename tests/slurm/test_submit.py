"""`megacode submit` on a real cluster: what interrupts a run costs no step beyond its last save."""

import json
import os
import signal

import pytest
import yaml
from support.launching import metrics, status
from support.submitting import Submitter, ending, write_small_recipe

from megacode.submit.restarts import begin, newest_step

STEPS = 100


@pytest.fixture(scope="module")
def submit(clusters, tmp_path_factory):
    return Submitter(clusters(2, 2), write_small_recipe(tmp_path_factory.mktemp("submit"), STEPS))


@pytest.fixture(scope="module")
def straight(submit):
    """The run without any interruption, by deepspeed's launcher on each node."""
    with ending(submit(submit.recipe.parent / "straight", "--launcher", "deepspeed")) as job:
        assert job.wait_for_end() == "COMPLETED", job.everything()
    return job


def figures(run):
    keys = ("step", "tokens", "loss", "grad_norm", "learning_rate", "validation_loss")
    return [{key: line.get(key) for key in keys} for line in metrics(run)]


def test_a_run_that_finishes(straight):
    run = straight.run
    assert status(run)["outcome"] == "finished"
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, STEPS + 1))
    (line,) = (json.loads(line) for line in (run / "slurm" / "jobs.jsonl").read_text().splitlines())
    assert line["job"] == straight.number
    assert set(line["code"]) == {"version", "commit", "dirty"}
    (folder,) = (path for path in (run / "slurm").iterdir() if path.is_dir())
    assert str(folder) == line["folder"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["run"] == str(run)
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml", "train.sbatch"]
    logs = run / "log" / f"job_{straight.number}_0"
    assert (logs / "hostfile").read_text() == "n1 slots=1\nn2 slots=1\n"
    (rank_0,) = logs.glob("*_rank0.log")
    assert f"step {STEPS}/{STEPS}" in rank_0.read_text()
    assert "starts at step 0" in straight.output
    assert f"the run has finished at step {STEPS}" in straight.log()


def test_a_run_that_much_interrupts_is_the_same_bit_for_bit(submit, straight):
    """A request before the limit, a lost node, a preemption; then it finishes."""
    cluster = submit.cluster
    with ending(submit(submit.recipe.parent / "interrupted", "--partition", "low", "--time", "10")) as job:
        second = submit.start(job.run)
        assert second.returncode == 2
        states = (f"error: run: the job {job.number} of {job.run} is {state} still" for state in ("pending", "running"))
        assert any(state in second.stderr for state in states)
        job.wait_for_step(2)
        job.signal_batch()

        job.wait_for_start(1)
        (end,) = job.starts("end")
        assert (end["again"], end["asked"]) == (True, True)
        begin = job.starts("begin")[1]
        assert begin["step"] == end["step"] >= 2, "no step is lost"
        job.wait_for_step(2)
        lost = job.process(rank=1)
        os.kill(lost, signal.SIGSTOP)  # what is on a node that is lost goes without a word
        cluster.run("scontrol", "update", "NodeName=n2", "State=down", "Reason=test")
        os.kill(lost, signal.SIGKILL)
        assert job.step() >= begin["step"] + 2
        # Refused where the node has come back by itself: its daemon lives.
        cluster.run("scontrol", "update", "NodeName=n2", "State=resume", check=False)

        job.wait_for_start(2)
        assert job.starts("begin")[2]["step"] == begin["step"], "steps beyond the last save are done again"
        job.wait_for_step(2)
        other = cluster.run("sbatch", "--parsable", "-N2", "--exclusive", "-o", "/dev/null", "--wrap=sleep 1").strip()
        job.wait(lambda: job.starts("end")[-1]["restarts"] == 2)
        end = job.starts("end")[-1]
        assert end["asked"]
        job.wait(lambda: other not in cluster.queued())

        job.wait_for_start(3)
        assert job.starts("begin")[3]["step"] == end["step"], "no step is lost"
        assert job.wait_for_end() == "COMPLETED", job.everything()
    assert status(job.run)["outcome"] == "finished"
    assert figures(job.run) == figures(straight.run)
    logs = sorted(path.name for path in (job.run / "log").iterdir())
    assert logs == [f"job_{job.number}_{number}" for number in range(4)]


def test_a_time_limit_then_a_cancellation_then_other_nodes(submit):
    run = submit.recipe.parent / "limited"
    options = ["schedule.steps=1000000", "parallel.pipeline=2"]
    with ending(submit(run, "--time", "3", "--signal-seconds", "175", *options)) as job:
        job.wait(lambda: "SLURM asks to end" in job.log())
        job.cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")  # of the next start
        job.wait(lambda: len(job.starts("end")) == 1)
        (end,) = job.starts("end")
        assert (end["again"], end["asked"]) == (True, True)
        assert end["step"] > 0
        job.wait_for_start(1)
        job.wait_for_step(1)
        assert job.starts("begin")[1]["step"] == end["step"], "no step is lost"
        job.cluster.run("scancel", job.number)
        assert job.wait_for_end() == "CANCELLED"
    assert len(job.starts("begin")) == 2
    saved = newest_step(run)
    assert saved > end["step"], "there is time to save"

    # Half the nodes: the recipe's two stages do not fit, one does. And deepspeed's launcher is asked to stop.
    with ending(submit(run, *options, "--launcher", "deepspeed", "--max-restarts", "0", nodes=1)) as job:
        assert "changed: parallel.pipeline 2 -> 1" in job.output
        assert f"goes on from step {saved}" in job.output
        job.wait_for_step(1)
        job.signal_batch()
        assert job.wait_for_end() == "FAILED"
    last = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["layout"]["pipeline"]) == (saved, 1)
    assert job.starts("end")[0]["step"] > saved
    assert "asked to stop; not started again: it was 0 times already" in job.log()


def test_a_stall_is_told_and_the_third_start_that_gains_nothing_is_the_last(submit):
    run = submit.recipe.parent / "stalled 5%t"  # SLURM has patterns of its own in paths
    options = ["schedule.steps=1000000", "faults.stall_seconds=20"]
    with ending(submit(run, "--sbatch", "hold", *options)) as job:
        for _ in range(2):
            begin(run, job.number, 0, 0)
        job.cluster.run("scontrol", "release", job.number)
        job.wait_for_step(2)
        os.kill(status(run)["pid"], signal.SIGSTOP)  # rank 0
        assert job.wait_for_end() == "FAILED"
    message = status(run)["message"]
    assert "rank 0 (host " in message
    assert message.endswith("; rank 1 waits for it")
    assert f"the run failed ({message}); not started again: no step was gained since step 0, in 3 starts" in job.log()
    assert len(list((run / "stacks").iterdir())) == 2
    assert "who " in (run / "log" / f"job_{job.number}_0" / "rank_00001.txt").read_text()


def test_what_is_asked_for_and_what_is_refused(submit, clusters):
    one = Submitter(clusters(1, 2, 4), submit.recipe)
    run = submit.recipe.parent / "asked"
    with ending(one(run, "--gpus-per-node", "2", "--sbatch", "hold", "--sbatch", "mem=10", nodes=1)) as job:
        asked = one.cluster.run("scontrol", "show", "job", job.number)
        assert "JobState=PENDING Reason=JobHeldUser" in asked
        assert "TresPerNode=gres:gpu:2" in asked
        assert "MinMemoryNode=10M" in asked
        refused = one.start(run, nodes=1)
        assert refused.returncode == 2
        assert f"error: run: the job {job.number} of {run} is pending still; wait for it, end it" in refused.stderr
    refused = one.start(run, "--partition", "nowhere", nodes=1)
    assert refused.returncode == 2
    assert "error: sbatch refused: " in refused.stderr
    assert "invalid partition specified: nowhere" in refused.stderr
    assert len([path for path in (run / "slurm").iterdir() if path.is_dir()]) == 1
