"""`megacode submit` before anything is sent: what is refused, which layout is taken, which command goes out."""

import json
import os
import shlex
import shutil
import sys

import pytest
import typer
from support.exports import write_checkpoint
from support.submitting import write_small_recipe
from typer.testing import CliRunner

from megacode import recipe as recipes
from megacode.checkpoint.reader import sealed
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError
from megacode.plan.hardware import HARDWARE
from megacode.plan.nearest import Places, nearest
from megacode.submit import job as jobs
from megacode.submit.restarts import begin
from megacode.tools.submit import submit

APP = typer.Typer()
APP.command()(submit)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_small_recipe(tmp_path_factory.mktemp("submit"), steps=9)


@pytest.fixture
def run(recipe, tmp_path):
    """Calls the command without sending anything; the lines that it prints."""

    def call(*arguments, dry=True):
        options = ["--dry-run"] if dry else []
        done = CliRunner().invoke(APP, [str(recipe), f"run={tmp_path}/run", *options, *map(str, arguments)])
        if isinstance(done.exception, UserError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output.splitlines()

    return call


def test_the_command(run, tmp_path):
    options = [
        "--time",
        "8:00:00",
        "--partition",
        "p",
        "--account",
        "lab",
        "--sbatch",
        "exclusive",
        "--sbatch",
        "mem=0",
    ]
    first, command = run("--nodes", 2, "--gpus-per-node", 4, *options)
    assert first == "2 x 4 processes: pipeline 1 x data 8 x context 1 x tensor 1, 1 micro-batches; starts at step 0"
    words = shlex.split(command)
    assert words[0] == "sbatch"
    variables = f"MEGACODE_PYTHON={sys.executable},MEGACODE_LAUNCHER=srun,MEGACODE_MAX_RESTARTS=100"
    assert set(words[1:-2]) == {
        "--parsable", "--job-name=run", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--signal=B:USR1@300",
        f"--output={tmp_path}/run/slurm/job_%j.txt", f"--export=ALL,{variables}", "--time=8:00:00", "--partition=p",
        "--account=lab", "--exclusive", "--mem=0",
    }  # fmt: skip
    assert words[-2] == str(jobs.SCRIPT)
    assert not (tmp_path / "run").exists(), "a dry run writes nothing"


def test_on_cpus(run):
    _, command = run("--nodes", 2, "--gpus-per-node", 0, "--tasks-per-node", 2, "--launcher", "deepspeed")
    assert "--ntasks-per-node=2" in command
    assert "--gpus" not in command
    assert "MEGACODE_LAUNCHER=deepspeed,MEGACODE_MAX_RESTARTS=100,DS_ACCELERATOR=cpu" in command


@pytest.mark.parametrize(
    ("processes", "override", "changed"),
    [
        (16, "", "batch.micro_samples 2 -> 1"),
        (3, "parallel={pipeline: 3, stages: [1, 2, 1]}", None),
        (1, "parallel={pipeline: 3, stages: [1, 2, 1]}", "parallel.pipeline 3 -> 1, parallel.stages [1, 2, 1] -> even"),
        (2, "parallel={tensor: 4, sequence: true}", "parallel.tensor 4 -> 2"),
        (12, "parallel={pipeline: 2, virtual_stages: 2, zero: 3}",
         "parallel.pipeline 2 -> 3, parallel.virtual_stages 2 -> 1"),
    ],
)  # fmt: skip
def test_the_nearest_layout_is_taken(run, processes, override, changed):
    lines = run("--nodes", processes, "--gpus-per-node", 1, *filter(None, [override]))
    told = [line for line in lines if line.startswith("changed: ")]
    assert len(told) == (changed is not None)
    assert told in ([f"changed: {changed}"], [])
    assert sum(line.startswith("the recipe's layout does not fit: ") for line in lines) == len(told)


def test_memory_that_is_too_small_is_told(run):
    sizes = ["batch.global_samples=1048576", "batch.micro_samples=1048576"]
    _, warning, _ = run("--nodes=1", "--gpus-per-node=1", *sizes)
    assert warning.startswith("warning: by the plan a GPU needs ")
    assert not any("warning" in line for line in run("--nodes=1", "--gpus-per-node=0", "--tasks-per-node=1", *sizes))


def test_what_no_layout_fits_is_said_in_the_users_own_words(run):
    """Not in those of a layout that was tried; with the number of nodes that would do."""
    told = (
        r"^no layout fits --nodes 1000 x --gpus-per-node 8 = 8000 processes: they must be a product of data ranks, "
        r"which divide batch.global_samples \(16\), tensor ranks, which divide model.heads \(4\), model.kv_heads \(2\) "
        r"and model.ffn \(176\), and pipeline ranks, at most model.layers \(4\); --nodes 16 is the largest smaller "
        r"number that fits$"
    )
    with pytest.raises(UserError, match=told):
        run("--nodes", 1000, "--gpus-per-node", 8)
    assert run("--nodes", 16, "--gpus-per-node", 8)
    with pytest.raises(UserError, match="no layout fits"):
        run("--nodes", 17, "--gpus-per-node", 8)


def test_where_memory_is_what_lacks(recipe):
    config = recipes.load(recipe, ["parallel.tensor=4", "model.vocabulary=616"])
    least = r"needs least memory \(tensor 1 pipeline 2 .*\) takes 3.\d+ MiB of 1000 B a GPU; take more nodes"
    with pytest.raises(UserError, match=rf"^no layout fits --nodes 2 x --gpus-per-node 1 = 2 processes: .* {least}"):
        nearest(config, Places(2, 1, "gpus-per-node"), 1000, HARDWARE["H100"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedule.step=3"], "unknown key; did you mean steps?"),
        (["tokenizer.path=/nowhere/t.model"], "/nowhere/t.model"),
        (["model.vocabulary=7"], "model.vocabulary is 7 and the tokenizer"),
        (["data.train=/nowhere/train"], "/nowhere/train"),
        (["data.valid=/nowhere/valid"], "/nowhere/valid"),
        (["checkpoint.start_from=/nowhere/c"], "/nowhere/c holds no checkpoint"),
        (["--tasks-per-node=2"], "--tasks-per-node is for CPUs"),
        (["--gpus-per-node=0"], "trains on CPUs; say how many processes a machine runs by --tasks-per-node"),
        (["--time=5"], "--time 5 is over before the run has begun: it is asked to save 300 s before that"),
        (["--gpus-per-node=7"], r"--gpus-per-node 7 = 7 processes: .*; no smaller number of nodes does; give another"),
        (["--gpus-per-node=1", "model.hidden=1048576"], "run: a checkpoint takes "),
        (
            ["--gpus-per-node=1", "--sbatch", "--array=0-3"],
            "--sbatch array: the jobs of an array",
        ),
        (["--gpus-per-node=1", "--sbatch", "nodes=4"], "--sbatch nodes: the layout is fitted to --nodes"),
        (["--gpus-per-node=1", "--sbatch", "signal=TERM@10"], "--sbatch signal: give --signal-seconds"),
        (["--gpus-per-node=1", "--sbatch", "no-requeue"], "--sbatch no-requeue: megacode submit sets it"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, message):
    with pytest.raises(UserError, match=message) as told:
        run("--nodes=1", *arguments)
    assert "\n" not in str(told.value)


def test_a_run_that_could_not_go_on_is_not_sent(recipe, run, tmp_path):
    """What the start would say after hours in the queue."""
    config = recipes.load(recipe, ["model.vocabulary=null"])
    checkpoint = write_checkpoint(tmp_path / "other")  # of another model and tokenizer
    options = ["--nodes=1", "--gpus-per-node=1"]
    with pytest.raises(UserError, match=r"model\.\w+ is .* and .*; change the one, or name another checkpoint.start"):
        run(*options, f"checkpoint.start_from={checkpoint.folder}")
    with pytest.raises(UserError, match=r"name one of .*/checkpoints/step_\*"):
        run(*options, f"checkpoint.start_from={tmp_path}/other")
    newest = tmp_path / "run" / "checkpoints" / "step_00000009"
    newest.mkdir(parents=True)
    content = json.loads((checkpoint.folder / "manifest.json").read_text())
    vocabulary = Tokenizer(config.tokenizer.path).vocabulary
    content["model"] = {**config.model.model_dump(mode="json"), "vocabulary": vocabulary}
    content["progress"] |= {"step": 9, "seed": 5}
    (newest / "manifest.json").write_text(json.dumps(sealed(content)))
    shutil.copyfile(config.tokenizer.path, newest / "tokenizer.model")
    with pytest.raises(UserError, match=r"seed is 0 and .* has 5; change it back"):
        run(*options)
    with pytest.raises(UserError, match=r"schedule.steps is 9 and .* has them all; raise it to go on"):
        run(*options, "seed=5")
    assert "goes on from step 9" in run(*options, "seed=5", "schedule.steps=20")[0]


def test_paths_that_sbatch_would_read_otherwise(run, tmp_path, monkeypatch):
    *_, command = run("--nodes=1", "--gpus-per-node=1", f"run={tmp_path}/1%j")
    assert f"--output={tmp_path}/1%%j/slurm/job_%j.txt" in shlex.split(command)
    monkeypatch.setattr(sys, "executable", "/opt/a,b/python")
    with pytest.raises(UserError, match="the path of Python, /opt/a,b/python, has a comma"):
        run("--nodes=1", "--gpus-per-node=1")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Gives the commands of a cluster, in bash."""

    def give(**programs):
        for name in jobs.COMMANDS:
            (tmp_path / name).write_text(f"#!/bin/bash\n{programs.get(name, '')}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return give


def test_what_is_of_another_job_is_not_handed_on(run, cluster, monkeypatch, tmp_path):
    for name in ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "7")
    cluster(sbatch=f"env | grep ^SLURM_ >{tmp_path}/environment; echo 5")
    assert run("--nodes=1", "--gpus-per-node=1", dry=False)[-2].startswith("job 5: ")
    assert (tmp_path / "environment").read_text() == "SLURM_CONF=7\n"


def test_a_job_that_may_have_been_taken_keeps_its_folder(run, cluster, tmp_path):
    cluster(sbatch="echo sbatch: error: Batch job submission failed: Socket timed out >&2; exit 1")
    with pytest.raises(UserError, match="timed out; but first see whether squeue shows the job"):
        run("--nodes=1", "--gpus-per-node=1", dry=False)
    (folder,) = (tmp_path / "run" / "slurm").iterdir()
    assert (folder / "recipe.yaml").exists()


REFUSED = "sbatch: error: Batch job submission failed: Invalid partition name specified"


def test_nothing_is_left_of_a_job_that_is_refused(run, recipe, cluster, tmp_path, monkeypatch):
    """The only line is the error, with sbatch's own reason: what comes before it would look like success."""
    options = ["--nodes=1", "--gpus-per-node=1", "--sbatch", "qos=none"]
    cluster(sbatch=f"echo '{REFUSED}' >&2; exit 1")
    deep = tmp_path / "a" / "b"
    result = CliRunner().invoke(APP, [str(recipe), f"run={deep}", *options])
    assert str(result.exception) == f"sbatch refused: {REFUSED}"
    assert result.output == ""
    assert not deep.parent.exists()
    (tmp_path / "sbatch").write_text("no program")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch cannot be started: Exec format error; mend"):
        run(*options, dry=False)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="sbatch cannot be started"):
        run(*options, dry=False)
    with pytest.raises(UserError, match="--sbatch nodes: the layout is fitted"):
        run(*options, "--sbatch", "nodes=3", dry=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"], "what was there stays"


def test_as_json(recipe, cluster, tmp_path):
    cluster(sbatch="echo 5")
    words = [str(recipe), f"run={tmp_path}/run", "--nodes=2", "--gpus-per-node=4", "--json", "-"]
    dry = json.loads(CliRunner().invoke(APP, [*words, "--dry-run"]).stdout)
    assert (dry["job"], dry["command"][0], "folder" in dry) == (None, "sbatch", False)
    found = json.loads(CliRunner().invoke(APP, words).stdout)
    (folder,) = (path for path in (tmp_path / "run" / "slurm").iterdir() if path.is_dir())
    assert {key: found[key] for key in ("job", "nodes", "tasks_per_node", "gpus_per_node", "step", "changed")} == {
        "job": "5", "nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4, "step": 0, "changed": [],
    }  # fmt: skip
    files = {"folder": "", "recipe": "/recipe.yaml", "script": "/train.sbatch"}
    assert {key: found[key] for key in files} == {key: f"{folder}{name}" for key, name in files.items()}
    assert found["log"] == f"{tmp_path}/run/slurm/job_5.txt"
    assert found["rank_logs"] == f"{tmp_path}/run/log/job_5_*/*"
    layout = found["layout"]
    assert [layout[axis] for axis in ("pipeline", "data", "context", "tensor", "stages")] == [1, 8, 1, 1, [[0, 4]]]
    assert found["command"] == json.loads((tmp_path / "run" / "slurm" / "jobs.jsonl").read_text())["command"]


def test_a_job_that_was_sent_by_hand_counts(run, cluster, tmp_path):
    begin(tmp_path / "run", "6", 0, 3)
    cluster(squeue="echo 5 RUNNING; echo 6 PENDING")
    with pytest.raises(UserError, match=r"run: the job 6 of .* is pending still"):
        run("--nodes=1", "--gpus-per-node=1", dry=False)


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("5:30", 330), ("1:30:00", 5400), ("1-12", 129600), ("1-12:30", 131400), ("0-0:0:7", 7),
     ("UNLIMITED", None), ("1:2:3:4", None), ("-5", None), ("", None)],
)  # fmt: skip
def test_limits_as_sbatch_takes_them(limit, seconds):
    assert jobs.seconds_of(limit) == seconds


def test_without_slurm(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs sbatch, squeue, scontrol, scancel on PATH"):
        run("--nodes=1", "--gpus-per-node=1", dry=False)
    assert not (tmp_path / "run").exists()
