"""The real `deepspeed` launcher: a run that crashes, goes on from its checkpoint and is exported; mistakes said once."""

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from support.launching import ENVIRONMENT, NUM_STEPS, ROOT, command, launch, metrics, status, write_recipe
from support.stalling import run_ranks

from megacode.checkpoint.reader import CheckpointReader
from megacode.checkpoint.keep import finished, newest
from megacode.kernels import dispatch
from megacode.tools.data.replay import as_json, open_step


def assert_ledger(run):
    """What the newest checkpoint says that the run was trained on is what its metrics say, step by step."""
    lines = [line for line in metrics(run) if "loss" in line]
    infilled = sum(round(line["infilled_share"] * sum(line["labels_by_source"].values())) for line in lines)
    assert CheckpointReader(newest(run)).progress.ledger == {
        "train": {"samples": NUM_STEPS * 8, "labels": NUM_STEPS * 8 * 64, "infilled_labels": infilled}
    }


def assert_same_run(run, straight):
    """Bit for bit: figures of every step, and the weights at the end."""
    keys = ("step", "tokens", "loss", "grad_norm", "learning_rate", "validation_loss")
    have, want = ([{k: line.get(k) for k in keys} for line in metrics(folder)] for folder in (run, straight))
    assert have == want
    ours, theirs = (CheckpointReader(newest(folder)) for folder in (run, straight))
    for name in theirs.names:
        assert (ours.read(name) == theirs.read(name)).all(), name


def assert_replayed(run, steps):
    """The samples that `megacode data replay` makes again have as many labels of each kind as the steps counted."""
    lines = {line["step"]: line for line in metrics(run) if "loss" in line}
    for number in steps:
        step = open_step(run, number)
        assert step.unknown is None, "the run says what its shards were"
        counts = Counter()
        uncut, infilled = 0, 0
        for sample in as_json(step, step.choose(None), tokens=True)["samples"]:
            infilled += sum(part["kind"] in ("PSM", "SPM") for part in sample["parts"])
            uncut += sum(part["kind"] in ("PSM", "SPM", "whole") for part in sample["parts"])
            for part in sample["parts"]:
                counts[part["kind"] in ("PSM", "SPM")] += sum(part["loss"])
        assert {"train": counts.total()} == lines[number]["labels_by_source"]
        assert counts[True] / counts.total() == pytest.approx(lines[number]["infilled_share"])
        documents = lines[number]["documents"]
        assert (documents["uncut"], documents["infilled"]) == (uncut, infilled)
        assert lines[number]["infilled_documents"] == (infilled / uncut if uncut else None)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("launcher"))


@pytest.fixture(scope="module")
def straight(recipe):
    """The run without any interruption."""
    run = recipe.parent / "straight"
    done = launch(recipe, f"run={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("starting at step 0 from random weights of seed 0\n") == 1
    assert (done.stdout + done.stderr).count("at step 0") == 1
    return run


def test_a_run_leaves_what_it_should(straight):
    steps = [line for line in metrics(straight) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, NUM_STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert set(steps[0]) >= {"tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_bytes", "mfu"}
    for line in steps:
        assert line["loss_by_source"] == {"train": line["loss"]}
        assert line["labels_by_source"] == {"train": 8 * 64}
        share = line["infilled_share"]
        mean = share * (line["loss_infilled"] or 0) + (1 - share) * line["loss_plain"]
        assert line["loss"] == pytest.approx(mean)
        assert not line["skipped"]
    assert any(line["infilled_share"] > 0 for line in steps)
    assert steps[-1]["tokens"] == NUM_STEPS * 8 * 64
    assert [line["step"] for line in metrics(straight) if "validation_loss" in line] == [4, 8]
    assert status(straight)["outcome"] == "finished"
    (start,) = (json.loads(line) for line in (straight / "starts.jsonl").read_text().splitlines())
    assert (start["step"], start["world_size"], sum(start["hosts"].values())) == (0, 4, 4)
    assert start["layout"]["stages"] == [[0, 2], [2, 4]]
    (source,) = start["data"]["sources"].values()
    assert (list(start["data"]["sources"]), start["data"]["packing"]) == (["train"], "concatenate")
    assert source["epochs"] == pytest.approx(NUM_STEPS * 8 / source["samples_per_epoch"])
    assert start["backends"] == dict.fromkeys((*dispatch.TABLE, "optimizer"), "torch")
    events = [json.loads(line) for line in (straight / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [4, 8]
    assert {event["event"] for event in events} <= {"checkpoint", "checkpoint_wait"}  # the disk may be slow
    assert len(status(straight)["memory_bytes"]) == 4
    for file in newest(straight).iterdir():
        assert file.stat().st_mode & 0o777 == (straight / "metrics.jsonl").stat().st_mode & 0o777, file
    names = ["latest", "step_00000004", "step_00000008"]
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == names
    assert (straight / "checkpoints/latest").read_text() == "step_00000008\n"
    assert yaml.safe_load((straight / "recipe.yaml").read_text())["model"]["vocabulary"] > 0
    assert_replayed(straight, range(1, NUM_STEPS + 1))


def test_a_crash_ends_all_ranks_and_the_run_goes_on_bit_for_bit(recipe, straight):
    """One rank dies, the others must not wait for it; the next start goes on from the last checkpoint,
    and with other processes reading."""
    run = recipe.parent / "crashed"
    with subprocess.Popen(
        command(recipe, f"run={run}"), cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        ranks, told = [], set()
        assert process.stdout is not None
        for line in process.stdout:
            if " spawned with command" in line:
                ranks.append(int(line.split("process ")[1].split()[0]))
            told |= {what for what in ("checkpoint in", "validation loss") if line.startswith("step 4") and what in line}
            if len(told) == 2:
                break
        os.kill(ranks[1], signal.SIGKILL)
        died = time.monotonic()
        process.stdout.read()
        assert process.wait(timeout=60) != 0
    assert time.monotonic() - died < 30
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert status(run)["outcome"] == "failed"  # a killed rank can't say so; another saw it go
    assert status(run)["message"].startswith(f"rank 1 (process {ranks[1]}) ended")
    assert (status(run)["rank"], status(run)["step"] >= 4) == (1, True)
    assert status(run)["checkpoint"] == f"{run}/checkpoints/step_00000004"

    done = run_ranks(recipe, f"run={run}", "data.workers=1")
    assert done.codes == [0] * 4, done.output[-3000:]
    assert f"resuming from {run}/checkpoints/step_00000004 at step 4" in done.output
    assert_same_run(run, straight)
    assert_ledger(run)
    assert_replayed(run, (3, 6))


def signalled(arguments, rank, number, code):
    """Send a rank a signal after step 2, expect the exit code, and return the ranks' process ids."""
    with subprocess.Popen(
        arguments, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        ranks, lines = [], []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if " spawned with command" in line:
                ranks.append(int(line.split("process ")[1].split()[0]))
            if line.startswith(f"step 2/{NUM_STEPS}"):
                os.kill(ranks[rank], number)
        assert process.wait(timeout=60) == code, "".join(lines)[-3000:]
    return ranks


def test_a_signal_to_one_rank_stops_all_at_one_step_and_the_run_goes_on_bit_for_bit(recipe, straight):
    run = recipe.parent / "signalled"
    signalled(command(recipe, f"run={run}"), rank=2, number=signal.SIGTERM, code=75)
    stopped = status(run)
    assert stopped["outcome"] == "stopped"
    assert stopped["message"] == "asked by SIGTERM"
    assert 2 < stopped["step"] < NUM_STEPS
    assert stopped["checkpoint"].endswith(f"step_{stopped['step']:08d}")
    assert len(stopped["memory_bytes"]) == 4
    done = run_ranks(recipe, f"run={run}")
    assert done.codes == [0] * 4, done.output[-3000:]
    assert_same_run(run, straight)
    assert len((run / "starts.jsonl").read_text().splitlines()) == 2


def test_a_rank_that_is_stopped_from_outside_ends_the_run_with_a_verdict(recipe):
    run = recipe.parent / "stalled"
    arguments = command(recipe, f"run={run}", "faults.stall_seconds=8", "parallel.pipeline=1", processes=2)
    ranks = signalled(arguments, rank=1, number=signal.SIGSTOP, code=76)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert f"rank 1 (host {socket.gethostname()}, process {ranks[1]}) is stopped in" in status(run)["message"]
    assert status(run)["message"].endswith("; rank 0 waits for it")
    assert status(run)["outcome"] == "failed"
    assert sorted(file.name[:10] for file in (run / "stacks").iterdir()) == ["rank_00000", "rank_00001"]


def test_files_ask_for_a_checkpoint_and_for_the_end(recipe, straight):
    run = recipe.parent / "asked"
    run.mkdir()
    (run / "SAVE").write_text("2")
    (run / "STOP").write_text("5")
    done = launch(recipe, f"run={run}")
    assert done.returncode == 75, done.stderr[-3000:]
    assert (status(run)["outcome"], status(run)["step"]) == ("stopped", 5)
    assert status(run)["message"] == f"asked by the file {run}/STOP"
    assert [folder.name[-1] for folder in finished(run)] == ["2", "4", "5"]
    assert not (run / "STOP").exists()
    assert not (run / "SAVE").exists()
    done = run_ranks(recipe, f"run={run}")
    assert done.codes == [0] * 4, done.output[-3000:]
    assert_same_run(run, straight)


def test_an_error_of_a_rank_is_told_and_ends_the_run(recipe):
    run = recipe.parent / "unwritable"
    run.mkdir()
    (run / "checkpoints").write_text("a file where a folder should be")
    done = launch(recipe, f"run={run}", "checkpoint.every_steps=1", processes=2)
    output = done.stdout + done.stderr
    assert done.returncode == 2, output[-3000:]
    assert status(run)["outcome"] == "failed"
    assert "Not a directory; remove the file that stands where a folder should, then start again" in status(run)["message"]
    assert output.count("error: ") == 1
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.step=3"], "schedule.step: unknown key; did you mean steps?"),
        (["parallel.pipeline=3"], "4 processes can't be shared by"),
        (["data.train=/nowhere/train"], "/nowhere/train"),
        (["tokenizer.path=/nowhere/t.model"], "/nowhere/t.model"),
        (["batch.sequence_length=1000", "batch.global_samples=2"], "global_samples"),
        (["--deepspeed_config", "/nowhere/ds.json"], "deepspeed_config: cannot read /nowhere/ds.json"),
        (["logging.profile_steps=[9]"], "logging.profile_steps: no step 9"),
        (["parallel.zero=2"], "ds_configs/zero3.json: zero_optimization.stage is 3"),
        (["kernels.attention=triton"], "kernels: backend 'triton' of attention cannot serve here: it needs a CUDA device"),
        (["kernels.rope=cuda"], "kernels.rope: Input should be 'auto', 'triton' or 'torch', not 'cuda'"),
        (["schedule.steps=many"], "schedule.steps: Input should be a valid integer, not 'many'"),
        (["tokenizer.path=launchers"], "launchers"),
        (["data.train=tests"], "tests"),
        (["model={preset: code-llama-70b, hidden: 1048576, vocabulary: null}"], "GiB free; make room"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_2_before_any_process_group(recipe, overrides, message):
    """Each rank finds it by itself; this is rank 0 of four as a launcher starts it, without the others."""
    done = run_ranks(recipe, *overrides, absent=(1, 2, 3))
    assert done.codes[0] == 2, done.output[-3000:]
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.output


def test_a_taken_port_is_one_line_and_exit_2(recipe):
    run = recipe.parent / "taken"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "launchers/train.py", str(recipe), f"run={run}", "parallel.pipeline=1"],
            cwd=ROOT, env={**ENVIRONMENT, "MASTER_PORT": port}, text=True, capture_output=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert [line for line in done.stderr.splitlines() if port in line] == [f"error: {status(run)['message']}"]
    assert status(run)["message"].startswith(f"MASTER_PORT {port} is in use")
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_one_line_and_exit_2(recipe, straight):
    run = recipe.parent / "damaged"
    shutil.copytree(straight, run)
    file = newest(run) / "weights_00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = run_ranks(recipe, f"run={run}", "schedule.steps=9", world_size=2)
    assert done.codes == [2, 2], done.output[-3000:]
    assert done.output.count("error: ") == 1
    mend = f"the run has an earlier one: move {newest(run)} away, and the next start takes step 4"
    assert f"error: {file} is damaged (its checksum differs); {mend}\n" in done.output
    assert "Traceback" not in done.output
    assert status(run)["outcome"] == "failed"


def test_a_loss_that_is_not_finite_ends_the_run(recipe):
    run = recipe.parent / "nan"
    done = run_ranks(recipe, f"run={run}", "optimizer.learning_rate=1e30", "optimizer.clip=0", world_size=2)
    assert done.codes == [1, 1], done.output[-3000:]
    assert status(run)["outcome"] == "failed"
    assert "lower optimizer.learning_rate" in status(run)["message"]
    assert [line["skipped"] for line in metrics(run)][-2:] == [False, True]
    assert metrics(run)[-1]["grad_norm"] is None
    assert newest(run) is None


def test_steps_that_are_not_finite_are_left_out_and_named_until_they_are_too_many(recipe):
    run = recipe.parent / "skips"
    changes = ["optimizer.learning_rate=1e30", "optimizer.clip=0", "schedule.warmup_steps=0"]
    skip = ["faults.non_finite=skip", "faults.skips_in_a_row=3"]
    done = run_ranks(recipe, f"run={run}", *changes, *skip, world_size=2)
    assert done.codes == [1, 1], done.output[-3000:]
    assert "and so 3 in a row (faults.skips_in_a_row)" in status(run)["message"]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["skip"] * 3 + ["failure"]
    for event in events[:3]:
        assert (event["first_sample"], event["num_samples"], event["policy"]) == (8 * (event["step"] - 1), 8, "skip")
    assert [line["skipped"] for line in metrics(run)] == [False, True, True, True]


def test_figures_on_request(recipe):
    """Phases, a profile, wandb offline and TensorBoard; MFU against the peak that the recipe gives."""
    run = recipe.parent / "figures"
    logging = {"phases": "true", "profile_steps": "[2]", "profile_ranks": "[1]", "wandb": "test", "tensorboard": "true"}
    changes = [f"logging.{key}={value}" for key, value in logging.items()]
    few = ["logging.peak_teraflops=0.1", "schedule.steps=3"]
    done = run_ranks(recipe, f"run={run}", *changes, *few, world_size=2)
    assert done.codes == [0, 0], done.output[-3000:]
    steps = [line for line in metrics(run) if "loss" in line]
    for line in steps:
        phases = line["phases"]
        assert set(phases) == {"data", "forward", "backward", "communication", "optimizer", "logging", "other"}
        assert all(phases[name] > 0 for name in phases)
        config = yaml.safe_load((run / "recipe.yaml").read_text())["model"]
        matrices = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176 + 2 * 64) + 64 + config["vocabulary"] * 64
        flops = 6 * matrices + 6 * 4 * 64 * 64
        assert line["mfu"] == pytest.approx(flops * line["tokens_per_second"] / (2 * 0.1e12))
    for line in steps[1:]:  # the first begins before its step
        assert sum(line["phases"].values()) == pytest.approx(line["step_seconds"], rel=0.5)
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "step_00000002_rank_00001.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"forward", "backward", "communication", "optimizer", "aten::mm"} <= names
    assert list((run / "tensorboard").iterdir())
    assert list((run / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize(
    ("override", "message"),
    [("model.hidden=32", "model.hidden is 32 and"), ("seed=5", "seed is 5 and"), ("batch.sequence_length=32", "batch.sequence_length is 32 and"), ("data.packing=best_fit", "data.packing is best_fit and")],
)
def test_the_run_folder_of_another_recipe_is_refused(recipe, straight, override, message):
    done = run_ranks(recipe, f"run={straight}", override, absent=(1, 2, 3))
    assert done.codes[0] == 2
    assert message in done.output


def test_a_mistake_under_the_launcher_is_said_once(recipe):
    done = launch(recipe, "schedule.step=3", processes=2)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("error: ") == 1
