"""What `megacode verify --layout` calls right and wrong, what it prints, and what it refuses before anything starts."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from support.training import recipe

from megacode import cli
from megacode.data.tokenizer import Tokenizer
from megacode.doctor.outcome import GRADIENT, WEIGHT, Outcome, combine, compare, deviations
from megacode.doctor.verify import Row, place, prepare, problems
from megacode.model.layers import Slice
from megacode.plan.cases import cases
from megacode.tools.verify import layouts, resume

NAMES = ("model.embed_tokens.weight", "model.layers.2.q.weight", "model.layers.10.q.weight")


def expected() -> Outcome:
    generator = torch.Generator().manual_seed(0)
    tensors = [{name: torch.randn(4, 6, generator=generator) for name in NAMES} for _ in range(2)]
    return Outcome([2.0, 1.0], [3.0, 4.0], *tensors, moved=10.0)


def halves(whole: Outcome, dim: int = 0) -> list[Outcome]:
    """What two tensor ranks would have of it, and two more data ranks, which have nothing."""
    ranks = [Outcome(whole.losses, whole.norms) for _ in range(4)]
    for rank in range(2):
        size = whole.weights[NAMES[0]].shape[dim] // 2
        parts = {name: Slice((4, 6), 1.0, dim, rank * size, (rank + 1) * size) for name in NAMES[:2]}
        parts[NAMES[2]] = Slice((4, 6), 1.0)  # both have it
        ranks[2 * rank].parts = parts
        for kind in ("gradients", "weights"):
            setattr(ranks[2 * rank], kind, {n: parts[n].take(v).clone() for n, v in getattr(whole, kind).items()})
    return ranks


# ---- how far two trainings are apart


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_the_same_training(dim):
    off = compare(halves(expected(), dim), expected())
    assert (off.loss, off.norm, off.gradient, off.weight, off.moved, off.worst[1]) == (0, 0, 0, 0, 0, 0)


def test_a_gradient_that_is_off():
    want, ranks = expected(), halves(expected())
    ranks[2].gradients[NAMES[1]][0, 0] += 0.5
    off = compare(ranks, want)
    assert off.worst == (NAMES[1], pytest.approx(0.5 / float(want.gradients[NAMES[1]].norm())))
    rest = sum(float(want.gradients[name].square().sum()) for name in NAMES[1:]) ** 0.5
    assert off.gradient == pytest.approx(0.5 / rest)  # the embedding is left out of this one
    assert off.weight == off.moved == 0
    ranks[2].gradients[NAMES[0]][0, 0] += 100
    assert compare(ranks, want).gradient == off.gradient
    assert compare(ranks, want).worst[0] == NAMES[0]


def test_a_copy_that_is_off():
    """Of copies of the same part the worst one counts."""
    ranks = halves(expected())
    ranks[2].weights[NAMES[2]] += 0.25
    off = compare(ranks, expected())
    assert off.weight == pytest.approx(0.25)
    assert off.moved == pytest.approx(0.25 * 24**0.5 / 10)


@pytest.mark.parametrize("kind", ["gradients", "weights"])
def test_what_is_missing_or_not_finite_is_infinitely_off(kind):
    def figure(ranks):
        off = compare(ranks, expected())
        return (off.worst[1], off.gradient) if kind == "gradients" else (off.weight, off.moved)

    ranks = halves(expected())
    del getattr(ranks[2], kind)[NAMES[1]]
    assert figure(ranks) == (math.inf, math.inf)
    ranks = halves(expected())
    getattr(ranks[2], kind)[NAMES[1]][1, 1] = math.nan
    assert figure(ranks) == (math.inf, math.inf)


def test_every_rank_counts():
    ranks = halves(expected())
    ranks[3].losses = [2.0, 1.25]
    ranks[1].norms = [math.nan, 4.0]
    off = compare(ranks, expected())
    assert off.losses == (0, 0.25)
    assert off.norms == (math.inf, 0)


def test_an_outcome_in_a_file(tmp_path):
    want = dataclasses.replace(expected(), seconds=1.5)
    want.save(tmp_path / "outcome.safetensors")
    have = Outcome.load(tmp_path / "outcome.safetensors")
    assert (have.losses, have.norms, have.moved, have.seconds) == (want.losses, want.norms, 10.0, 1.5)
    for kind in ("gradients", "weights"):
        assert set(getattr(have, kind)) == set(NAMES)
        for name, value in getattr(want, kind).items():
            assert torch.equal(getattr(have, kind)[name], value)
    assert len(load_file(tmp_path / "outcome.safetensors")) == 6
    found = list(deviations(want, have))
    assert {(d.kind, d.name) for d in found} == {(kind, name) for kind in (GRADIENT, WEIGHT) for name in NAMES}
    assert combine([want], found, have).loss == 0


# ---- the verdict


def judge(change, precision="fp32"):
    want, have = expected(), expected()
    change(have)
    return problems([have], compare([have], want), want, precision)


def test_what_is_right():
    assert judge(lambda have: None) == []

    def a_little(have):
        have.losses[1] *= 1 + 9e-6
        have.norms[0] *= 1 - 9e-6
        have.gradients[NAMES[0]] *= 1 + 9e-5
        have.weights[NAMES[1]][0, 0] += 9e-3

    assert judge(a_little) == []
    assert judge(lambda have: have.losses.__setitem__(0, 2.007), "bf16") == []


def test_a_wrong_loss():
    (line,) = judge(lambda have: have.losses.__setitem__(1, 1.1))
    assert line == "loss of step 2: 1.1, in one process 1: 1e-01 off (tolerance 1e-05)"
    (line,) = judge(lambda have: have.losses.__setitem__(0, 2.01), "bf16")
    assert line == "loss of step 1: 2.01, in one process 2: 5e-03 off (tolerance 4e-03)"
    (line,) = judge(lambda have: have.losses.__setitem__(1, math.nan))
    assert line == "loss of step 2: nan, in one process 1: inf off (tolerance 1e-05)"


def test_a_wrong_norm_of_right_gradients():
    first, second = judge(lambda have: have.norms.__setitem__(0, 1.5))
    assert first == "norm of step 1: 1.5, in one process 3: 5e-01 off (tolerance 1e-05)"
    assert second == "the gradients of step 1 are right: it is the norm, and clipping by it, that is not the model's"
    (only,) = judge(lambda have: have.norms.__setitem__(1, 1.5))
    assert only.startswith("norm of step 2")


def test_wrong_gradients():
    def change(have):
        have.norms[0] = 1.5
        have.gradients[NAMES[1]] *= 1.001
        have.gradients[NAMES[2]] *= 2

    norm, gradients = judge(change)
    assert norm.startswith("norm of step 1")
    assert gradients == (
        f"gradients of step 1: 2 of 3 wrong, most {NAMES[2]}, 1e+00 of its norm off (tolerance 1e-04), "
        f"the first {NAMES[1]}"
    )
    _, gradients = judge(change, "bf16")
    assert gradients.startswith("gradients of step 1: ")
    assert gradients.endswith("(tolerance 4e-02)")


def test_wrong_weights():
    (line,) = judge(lambda have: have.weights[NAMES[1]].add_(0.01))
    assert line == "weights: 5e-03 of their way off (tolerance 1e-03)"


# ---- what is printed and written


def test_the_table_and_the_json(capsys):
    _, (right, wrong, dead) = cases(recipe(), ["tp2 pp2", "dp2", "pp4 v1 bf16"])
    have = expected()
    have.losses[1] = math.nan
    off = compare([have], expected())
    rows = [
        Row(right, expected(), compare([expected()], expected())),
        Row(wrong, have, off, problems([have], off, expected(), "fp32")),
        Row(dead, problems=["rank 3 ended with exit code -9"]),
    ]
    layouts._show(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["tp2", "pp2", "zero1", "4", "8", "0e+00"] in [line[:6] for line in lines]
    assert ["pp4", "zero1", "bf16", "4", "8", "FAILED"] in lines
    assert sum("ok" in line for line in lines) == 1
    assert ["FAILED:", "pp4", "zero1", "bf16:", "rank", "3", "ended", "with", "exit", "code", "-9"] in lines
    good, bad, gone = (json.loads(json.dumps(layouts.plain(row), allow_nan=False)) for row in rows)
    assert good["ok"]
    assert good["losses"] == [2.0, 1.0]
    assert good["worst_gradient"]["difference"] == 0
    assert (bad["ok"], bad["losses"], bad["loss_difference"]) == (False, [2.0, None], None)
    assert bad["problems"] == ["loss of step 2: nan, in one process 1: inf off (tolerance 1e-05)"]
    assert gone == {
        "layout": "pp4 zero1 bf16", "processes": 4, "micro_batches": 8, "ok": False,
        "problems": ["rank 3 ended with exit code -9"],
    }  # fmt: skip


def test_the_place(monkeypatch):
    _, wanted = cases(recipe(), ["tp2 pp2", "dp2"])
    assert place(wanted) == (False, "CPU processes, gloo")
    monkeypatch.setattr("megacode.doctor.verify.training_device", lambda: torch.device("cuda"))
    too_few = "CPU processes, gloo (4 GPUs are needed and 2 are here)"
    for num_gpus, expected in ((4, (True, "GPUs, NCCL")), (2, (False, too_few))):
        monkeypatch.setattr(torch.cuda, "device_count", lambda num=num_gpus: num)
        assert place(wanted) == expected


def test_what_is_compared(tmp_path, monkeypatch):
    """The recipe's own model, scaled, with its tokenizer's vocabulary, at a tenth of its peak learning rate."""
    from support.exports import train_tokenizer

    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    monkeypatch.setattr("megacode.train.start.open_streams", lambda recipe, tokenizer: None)
    config = recipe(tokenizer={"path": str(tokenizer)}, model={"vocabulary": None}, optimizer={"learning_rate": 2e-3})
    small, (case,) = prepare(config, ["pp2 bf16"], 2)
    assert small.optimizer.learning_rate == case.recipe.optimizer.learning_rate == pytest.approx(2e-4)
    assert (small.model.layers, case.recipe.parallel.pipeline, case.recipe.precision) == (2, 2, "bf16")
    assert case.recipe.model.vocabulary == Tokenizer(tokenizer).vocabulary


# ---- mistakes


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments): the command's exit code, and its lines on standard error."""

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["megacode", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, capsys.readouterr().err.splitlines()

    return command


DEMO = "launchers/recipes/demo.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DEMO], 'say what to verify: --layout "tp2 pp2", --resume, or both'),
        ([DEMO, "--layout", "zero1", "--json", "/nowhere/x.json"], "--json: /nowhere is no folder; make it"),
        ([DEMO, "--layout", "tp2 oops"], '--layout "tp2 oops": oops is no word of a layout'),
        ([DEMO, "--layout", "zero1", "--layout", "tp4"], '--layout "tp4": model.heads (6)'),
        ([DEMO, "--layout", "dp3"], "the next one up is 12"),
        ([DEMO, "--layout", "zero1", "tokenizer.path=/nowhere/t.model"], "/nowhere/t.model"),
        ([DEMO, "--layout", "zero1", "--resume", "--processes", 3], "3 processes can't be shared by"),
        ([DEMO, "--resume", "--processes", 12], "global_samples"),
        (["/nowhere/my.yaml", "--layout", "zero1"], "cannot read the recipe /nowhere/my.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, monkeypatch, arguments, message):
    monkeypatch.setattr(resume, "_train", None)  # no run is started
    code, lines = run(*arguments)
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_mistakes_in_what_the_recipe_names(run, tmp_path, monkeypatch):
    from support.exports import train_tokenizer, write_checkpoint

    tokenizer = train_tokenizer(tmp_path / "tokenizer.model")
    given = [DEMO, "--layout", "zero1", f"tokenizer.path={tokenizer}"]
    code, (line,) = run(*given, f"data.train={tmp_path / 'none'}")
    assert (code, str(tmp_path / "none") in line) == (2, True)
    reader = write_checkpoint(tmp_path)
    monkeypatch.setattr("megacode.train.start.open_streams", lambda recipe, tokenizer: None)
    code, (line,) = run(*given, f"checkpoint.start_from={reader.folder}")
    assert (code, "model.layers is 4 and" in line) == (2, True)
    file = tmp_path / "deepspeed.json"
    file.write_text('{"step_per_print": 1}')
    code, (line,) = run(*given[:2], "zero3", given[3], f"deepspeed_config={file}")
    assert (code, line.startswith(f"error: {file}: step_per_print: unknown to DeepSpeed")) == (2, True)
    code, (line,) = run(*given, "model.hidden=60000", "model.heads=600", "model.kv_heads=600", "model.layers=100")
    assert code == 2
    assert line.endswith("are free; shrink the model with --scale")
