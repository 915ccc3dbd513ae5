"""`megacode plan`: verdicts, the search, the written recipe, and what it never imports."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from support.exports import train_tokenizer
from typer.testing import CliRunner

from megacode import recipe as recipes
from megacode.cli import app
from megacode.data.tokenizer import Tokenizer
from megacode.errors import UserError
from megacode.kernels import rows
from megacode.parallel.timeline import simulate
from megacode.plan.activations import activation_bytes, moment_bytes
from megacode.plan.cost import Cost
from megacode.plan.hardware import HARDWARE
from megacode.plan.layout import fit
from megacode.plan.memory import memory, recipe_job, stage_memory, worst_stage
from megacode.plan.model import num_parameters
from megacode.plan.search import RECOMPUTE, apply, mend, search
from megacode.plan.shape import PART_ELEMENTS
from megacode.plan.units import GIB, size

H100 = HARDWARE["H100"]


@pytest.fixture(scope="module")
def found():
    """What fits on 64 GPUs."""
    return search(big(), 64, 76 * GIB, H100)


def big(**sections):
    """Code Llama 34B on sequences of 4,096 tokens, 64 a step."""
    values = {
        "run": "unused",
        "model": {"preset": "code-llama-34b"},
        "tokenizer": {"path": "unused"},
        "data": {"train": "unused"},
        "batch": {"global_samples": 64, "micro_samples": 1, "sequence_length": 4096},
        "optimizer": {"learning_rate": 3e-4},
        "schedule": {"steps": 2000},
    }
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value}
    return recipes.Recipe.model_validate(values)


def write(path, **sections):
    config = big(**sections)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return config


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_stages_differ_by_what_they_hold():
    """Micro-batches in flight fall from stage to stage; embedding, head and logits stand at the ends only."""
    config = big(parallel={"tensor": 8, "pipeline": 4})
    stages = stage_memory(config, fit(config, 32))
    assert [stage.in_flight for stage in stages] == [4, 3, 2, 1]
    assert [stage.logits_bytes > 0 for stage in stages[:3]] == [False] * 3
    assert stages[0].parameters_bytes - stages[1].parameters_bytes == 2 * 4000 * 8192
    activations = [stage.activations_bytes for stage in stages[:3]]
    assert activations == sorted(activations, reverse=True)


def test_the_search_agrees_with_all_stages():
    """`worst_stage` leaves ranks out; uneven layers must not fool it."""
    for tensor, pipeline, virtual in ((1, 7, 1), (2, 5, 2), (8, 8, 1), (4, 16, 2)):
        for zero in (1, 2, 3):
            parallel = {"tensor": tensor, "pipeline": pipeline, "virtual_stages": virtual, "zero": zero}
            config = big(parallel=parallel, batch={"global_samples": 560})
            job = recipe_job(config, fit(config, tensor * pipeline))
            assert worst_stage(job).total_bytes == max(stage.total_bytes for stage in memory(job))


@pytest.mark.parametrize(("pipeline", "virtual", "batches"), [(4, 1, 8), (4, 1, 2), (8, 1, 64), (4, 2, 8), (4, 4, 16)])
def test_the_bubble_is_that_of_the_schedule(pipeline, virtual, batches):
    """Against a clock that runs one_f_one_b's own lists, with equal stages and backwards that take twice as long."""
    free = replace(H100, link_gb_per_second=1e12, network_gb_per_second=1e12)
    config = big(parallel={"pipeline": pipeline, "virtual_stages": virtual}, batch={"global_samples": batches})
    cost = Cost(recipe_job(config, fit(config, pipeline)), free)
    idle = cost._bubble_seconds / sum((f + b).total for f, b in cost._work) * pipeline / batches
    share = simulate(pipeline, batches, virtual).bubble_share
    assert idle == pytest.approx(share / (1 - share), rel=0.1)


def test_the_search_ranks_what_fits_and_says_why_the_rest_does_not(found):
    seconds = [choice.cost.seconds.total for choice in found.fitting]
    assert seconds == sorted(seconds)
    assert all(choice.worst.total_bytes <= 76 * GIB for choice in found.fitting)
    reasons = [one.reason for one in found.rejected.values()]
    assert any("model.kv_heads (8) can't be split over parallel.tensor (16)" in reason for reason in reasons)
    needs = [one for one in found.rejected.values() if "GiB on stage" in one.reason]
    assert needs
    assert all(one.needs_bytes > 76 * GIB for one in needs)


def test_every_proposal_is_a_recipe(found):
    config = big()
    for choice in found.fitting:
        changed = apply(config, choice.changes)
        assert recipes.Recipe.model_validate(changed.model_dump()) == changed
        fit(changed, 64)


def test_hand_made_stages_give_way_to_other_numbers_of_stages():
    """And without tensor ranks there is no sequence to share."""
    config = big(parallel={"tensor": 8, "sequence": True, "pipeline": 2, "stages": [23, 25]})
    found = search(config, 64, 76 * GIB, H100)
    for choice in found.fitting:
        recipes.Recipe.model_validate(apply(config, choice.changes).model_dump())
    assert {choice.cost.job.layout.pipeline for choice in found.fitting} > {1, 2, 4}
    assert "pipeline" in mend(config, 64, 5 * GIB) or "no single change" in mend(config, 64, 5 * GIB)


def test_recomputation_is_proposed_where_a_layout_needs_it_only():
    found = search(big(), 64, 40 * GIB, H100)
    by_policy = {policy: [c for c in found.fitting if c.cost.job.recompute == policy] for policy in RECOMPUTE}
    assert all(by_policy.values())
    for choice in by_policy["full"] + by_policy["selective"]:
        kept = choice.cost.job
        assert worst_stage(replace(kept, recompute="none")).total_bytes > 40 * GIB
    assert any(choice.cost.job.sequence_parallel for choice in found.fitting)


def test_context_ranks_are_proposed_for_long_sequences():
    """Half a sequence on a rank: half the activations, but attention's output twice."""
    long = {"global_samples": 64, "sequence_length": 16384}
    config = big(batch=long)
    contexts = {choice.cost.job.layout.context for choice in search(config, 16, 76 * GIB, H100).fitting}
    assert contexts == {1, 2, 4}
    whole, half = (
        recipe_job(changed, fit(changed, 64))
        for changed in (big(batch=long, parallel={"context": context, "pipeline": 8}) for context in (1, 2))
    )
    assert whole.tokens == half.tokens == 64 * 16384
    joined = 2 * half.shape.hidden * half.local_tokens
    assert activation_bytes(half) == pytest.approx(activation_bytes(whole) / 2 + joined)
    assert Cost(half, H100).seconds.context > 0 == Cost(whole, H100).seconds.context
    assert Cost(half, H100).seconds.attention == pytest.approx(Cost(whole, H100).seconds.attention)


def test_temporaries_of_kernels_do_not_grow_with_the_tokens():
    """They are those of one part of the rows, as the kernels of plain torch take them."""
    assert PART_ELEMENTS == rows.CACHED_ELEMENTS
    one, two = (
        recipe_job(config, fit(config, 64))
        for config in (big(parallel={"tensor": 8}, batch={"micro_samples": n}) for n in (1, 2))
    )
    moments = [moment for moment in (*one.shape.block.moments, one.shape.last_norm_moment) if moment.part]
    assert len(moments) == 5
    for moment in moments:
        bounded = 2 * moment_bytes(one, moment) - moment_bytes(two, moment)
        assert bounded == pytest.approx(moment.part.element_bytes * PART_ELEMENTS)


def test_a_mend_that_is_enough_is_named():
    config = big(parallel={"tensor": 8, "pipeline": 4}, batch={"micro_samples": 2})
    assert max(stage.total_bytes for stage in stage_memory(config, fit(config, 64))) > 44 * GIB
    assert mend(config, 64, 44 * GIB).startswith("set micro_samples 1 (")


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write(tmp_path / "mine.yaml", parallel={"tensor": 8, "pipeline": 4})
    done = run("mine.yaml", "--gpus", 64, "--memory-gib", 76, "--json", "plan.json")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("fits: stage 0 needs ")
    report = json.loads((tmp_path / "plan.json").read_text())["own"]
    planned = stage_memory(config, fit(config, 64))
    assert [row["total_gib"] for row in report["stages"]] == [stage.total_bytes / GIB for stage in planned]
    assert report["step_seconds"] == pytest.approx(sum(report["parts_seconds"].values()))
    aside = run("mine.yaml", "--gpus", 64, "--memory-gib", 76, "--json", "-")
    assert json.loads(aside.stdout)["own"] == report
    assert aside.stderr == done.output
    small = run("mine.yaml", "--gpus", 64, "--memory-gib", 10)
    assert small.exit_code == 1
    assert small.output.startswith("does not fit: stage 0 needs ")


def test_small_models_are_told_in_smaller_units(tmp_path):
    """No column of zeros: MiB where nothing in a table comes to a GiB."""
    write(tmp_path / "small.yaml", model={"preset": "nano", "vocabulary": 300}, batch={"sequence_length": 256})
    done = run(tmp_path / "small.yaml", "--gpus", 8)
    assert done.exit_code == 0, done.output
    assert re.match(r"fits: stage 0 needs [\d.]+ MiB of 76 GiB\n", done.output)
    assert "MiB of a GPU at its worst moment" in done.output
    assert "host MiB a GPU" in done.output
    row = next(line.split() for line in done.output.splitlines() if line.split()[:2] == ["0", "4"])
    assert all(float(value) > 0 for value in row[4:7])
    write(tmp_path / "big.yaml")
    assert "GiB of a GPU at its worst moment" in run(tmp_path / "big.yaml", "--gpus", 64).output
    assert [size(value) for value in (0, 2000, 252_000_000, 51.339 * GIB, 2**50)] == [
        "0 B", "1.953 KiB", "240.3 MiB", "51.34 GiB", "1,024 TiB",
    ]  # fmt: skip


def test_the_winner_is_written_as_a_recipe(tmp_path):
    """In another folder, over overrides: it must load, fit, and say only what differs."""
    (tmp_path / "recipes").mkdir()
    base, file = tmp_path / "recipes" / "mine.yaml", tmp_path / "fast.yaml"
    write(base)
    done = run(base, "--gpus", 64, "--memory-gib", 76, "--write", file, "optimizer.clip=0.25")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("does not fit: ")
    said = yaml.safe_load(file.read_text())
    assert said.pop("base") == "recipes/mine.yaml"
    assert said.pop("optimizer") == {"clip": 0.25}
    assert set(said) <= {"parallel", "batch"}
    config = recipes.load(file)
    assert max(stage.total_bytes for stage in stage_memory(config, fit(config, 64))) <= 76 * GIB


def test_the_tokenizer_gives_the_vocabulary(tmp_path):
    """Of a recipe that leaves it to the tokenizer; what is written leaves it too."""
    base, file = tmp_path / "mine.yaml", tmp_path / "fast.yaml"
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    config = write(base, model={"vocabulary": None}, tokenizer={"path": str(tokenizer)})
    done = run(base, "--gpus", 64, "--write", file, "--json", tmp_path / "plan.json")
    assert done.exit_code == 0, done.output
    model = config.model.model_copy(update={"vocabulary": Tokenizer(tokenizer).vocabulary})
    assert json.loads((tmp_path / "plan.json").read_text())["own"]["parameters"] == num_parameters(model)
    assert "model" not in yaml.safe_load(file.read_text())


def test_bad_use_is_refused_with_the_mend(tmp_path):
    base = tmp_path / "mine.yaml"
    write(base)
    for arguments, message in (
        (["model.vocabulary=null"], r"model\.vocabulary is left to the tokenizer and unused is not there; say it for"),
        (["--efficiency", "0"], r"--efficiency must be above 0"),
        (["--memory-gib", "-1"], r"--memory-gib must be above 0, not -1"),
        (["--memory-gib", "nan"], r"--memory-gib must be above 0, not nan"),
        (["parallel.tensor=3"], r"processes can't be shared"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, ["plan", str(base), "--gpus", "64", *arguments], catch_exceptions=False)
    assert run(base, "--gpus", 64, "--search", "parallel.tensor=3").exit_code == 0


def test_offload_moves_state_to_the_host():
    config = big(parallel={"zero": 3})
    job = recipe_job(config, fit(config, 64))
    here, away = worst_stage(job), worst_stage(replace(job, offload="all"))
    assert away.optimizer_bytes == 0
    assert here.host_bytes == here.optimizer_bytes, "a checkpoint's copy"
    assert away.host_bytes >= 2 * here.optimizer_bytes
    assert away.total_bytes < here.total_bytes


def test_planning_imports_no_torch(tmp_path):
    write(tmp_path / "mine.yaml")
    code = (
        "import sys; from megacode.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "plan", str(tmp_path / "mine.yaml"), "--gpus", "64", "--search"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_written_does_not_replace_the_recipe_or_its_base(tmp_path):
    write(tmp_path / "base.yaml")
    kept = (tmp_path / "base.yaml").read_text()
    (tmp_path / "mine.yaml").write_text("base: base.yaml\n")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "base.yaml")
    for option, name in (("--write", "mine"), ("--write", "base"), ("--write", "link"), ("--json", "base")):
        done = run(tmp_path / "mine.yaml", "--gpus", 64, option, tmp_path / f"{name}.yaml")
        assert done.exit_code != 0
        assert "name another file" in str(done.exception)
    assert (tmp_path / "base.yaml").read_text() == kept
    done = run(tmp_path / "mine.yaml", "--gpus", 64, "--write", tmp_path / "none" / "fast.yaml")
    assert "--write:" in str(done.exception)
