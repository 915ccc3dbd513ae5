"""The backends of the optimizer's step: the same AdamW each, and refusals that say why."""

import sys

import pytest
import torch
from deepspeed.ops.adam import cpu_adam
from support.stepping import COMPILED, adamw
from support.training import recipe
from torch.utils import cpp_extension

from megacode.doctor.kernels import check_optimizer
from megacode.engine import optimizer
from megacode.errors import UserError
from megacode.model.layers import Slice
from megacode.recipe import OptimizerSection

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SECTION = OptimizerSection(learning_rate=1e-2, epsilon=1e-3)
APEX = '''
import torch

class FusedAdam(torch.optim.Optimizer):
    """As apex's counts, and as it fails: a group's count is of its calls, and a group must have tensors."""

    def __init__(self, params, lr, betas, eps, weight_decay=0.0, adam_w_mode=True):
        assert adam_w_mode
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def step(self, closure=None):
        for group in self.param_groups:
            group["params"][0].device
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                (b1, b2), m, v, t = group["betas"], state["exp_avg"], state["exp_avg_sq"], group["step"]
                m.mul_(b1).add_(p.grad, alpha=1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                direction = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])
                p.data.sub_(group["lr"] * (direction + group["weight_decay"] * p.data))
'''


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """A package that passes for NVIDIA's."""
    files = {"apex/__init__.py": "", "apex/optimizers.py": APEX, "amp_C.py": ""}
    files["apex/normalization/__init__.py"] = "class FusedRMSNorm: pass"
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


def parameters(*sizes: int) -> list[torch.nn.Parameter]:
    """One matrix each, and a norm of the first's size."""
    torch.manual_seed(0)
    found = [torch.nn.Parameter(torch.randn(size, 3)) for size in sizes] + [torch.nn.Parameter(torch.ones(sizes[0]))]
    for parameter in found:
        parameter.part = Slice(parameter.shape, std=0.02 if parameter.ndim == 2 else 0.0)
    return found


def step_all_at_once(made, numbers):
    """As ZeRO-1 and 2."""
    made.step()


def step_one_by_one(made, numbers):
    """As ZeRO-3: each tensor by itself, the groups' other tensors being away."""
    whole = [group["params"] for group in made.param_groups]
    for mine, tensors in enumerate(whole):
        for tensor in tensors:
            for number, group in enumerate(made.param_groups):
                group["params"] = [tensor] if number == mine else []
            made.step()
    for group, tensors in zip(made.param_groups, whole, strict=True):
        group["params"] = tensors


def check_steps(backend: str, sizes: tuple[int, ...], step) -> None:
    found = parameters(*sizes)
    groups = optimizer.param_groups(found, SECTION)
    made = optimizer.TABLE[optimizer.OPERATION][backend].function(groups, SECTION, CPU)
    states = [(p.detach().double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()) for p in found]
    for number, rate in enumerate([1e-2, 2e-2, 5e-3], start=1):
        for group in made.param_groups:
            group["lr"] = rate
        for parameter in found:
            parameter.grad = torch.randn_like(parameter)
        decays = [0.1 if p.ndim == 2 else 0.0 for p in found]
        states = [
            adamw(state, p.grad, number, SECTION, rate, decay)
            for state, p, decay in zip(states, found, decays, strict=True)
        ]
        step(made, number)
    for parameter, (weight, mean, square) in zip(found, states, strict=True):
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=5e-7, atol=2e-7)
        torch.testing.assert_close(made.state[parameter]["exp_avg"].double(), mean, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(made.state[parameter]["exp_avg_sq"].double(), square, rtol=2e-6, atol=1e-7)


STEPS = pytest.mark.parametrize("step", [step_all_at_once, step_one_by_one])


@STEPS
@pytest.mark.parametrize("backend", ["torch", pytest.param("deepspeed", marks=COMPILED)])
def test_each_backend_makes_the_step_of_adamw(backend, step):
    check_steps(backend, (7, 1000), step)


@STEPS
def test_the_step_through_apex_counts_each_tensor_for_itself(apex, step):
    check_steps("apex", (7, 1000), step)


@pytest.mark.parametrize("backend", ["torch", "apex", pytest.param("deepspeed", marks=COMPILED)])
def test_a_step_that_must_be_left_out_changes_nothing(apex, backend):
    found = parameters(5)
    made = optimizer.TABLE[optimizer.OPERATION][backend].function(optimizer.param_groups(found, SECTION), SECTION, CPU)

    def step(left_out: float) -> list[torch.Tensor]:
        made.found_inf = torch.tensor(left_out)
        for parameter in found:
            parameter.grad = torch.full_like(parameter, float("nan") if left_out else 1.0)
        made.step()
        values = [made.state[p][key] for p in found for key in ("exp_avg", "exp_avg_sq", "step")]
        return [torch.as_tensor(value, dtype=torch.float32).clone() for value in [*found, *values]]

    before = step(0.0)
    for have, want in zip(step(1.0), before, strict=True):
        assert have.equal(want)
    assert any(not have.equal(want) for have, want in zip(step(0.0), before, strict=True))


def test_auto_takes_torchs_and_every_other_one_says_what_it_lacks(monkeypatch):
    choice = optimizer.choose(recipe(), CPU)
    assert (choice.name, choice.reason) == ("torch", "the preferred one")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    rows = {row.backend: row for row in optimizer.explain(CPU)}
    assert set(rows) == {"torch", "apex", "deepspeed"}
    assert (rows["torch"].chosen, rows["torch"].refusal) == (True, None)
    assert "it needs the masters on a CUDA device and they are on the cpu" in rows["apex"].refusal
    assert "there is no C++ compiler (/no/such/compiler)" in rows["deepspeed"].refusal
    finding = check_optimizer(CPU)  # what the doctor says of it
    assert finding.state == "ok"
    assert finding.text == f"torch: not apex: {rows['apex'].refusal}; not deepspeed: {rows['deepspeed'].refusal}"


@pytest.mark.parametrize(
    ("backend", "lacks"), [("apex", "needs the masters on a CUDA device"), ("deepspeed", "no C[+][+] compiler")]
)
def test_one_that_cannot_serve_is_refused_in_a_line(monkeypatch, backend, lacks):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    config = recipe(optimizer={"learning_rate": 1e-2, "backend": backend})
    with pytest.raises(UserError, match=f"backend '{backend}' of optimizer cannot serve here: .*{lacks}.*auto, torch"):
        optimizer.choose(config, CPU)


def test_on_a_gpu_deepspeed_needs_nvcc_and_apex_its_extensions(apex, monkeypatch, tmp_path):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("CXX", sys.executable)
    refusals = {row.backend: row.refusal for row in optimizer.explain(CUDA)}
    assert "DeepSpeed compiles it with nvcc: CUDA_HOME does not exist" in refusals["deepspeed"]
    assert refusals["apex"] is None
    (tmp_path / "amp_C.py").write_text("raise ImportError('amp_C.so: undefined symbol')")
    sys.modules.pop("amp_C", None)
    assert "it is installed but does not import: amp_C.so: undefined symbol" in optimizer.explain(CUDA)[1].refusal


def test_offloaded_masters_are_on_the_cpu_whatever_the_models_device():
    config = recipe(parallel={"zero": 3}, deepspeed_config="ds_configs/zero3_offload.json")
    assert optimizer.masters_device(config, CUDA) == CPU
    assert optimizer.masters_device(recipe(parallel={"zero": 3}), CUDA) == CUDA


def test_a_build_that_fails_is_told_in_a_line(monkeypatch):
    class Broken:
        def load(self):
            raise RuntimeError("Error building extension 'cpu_adam':\n fatal error: omp.h: No such file")

    monkeypatch.setattr(cpu_adam, "CPUAdamBuilder", Broken)
    with pytest.raises(
        UserError, match=r"can't be compiled or loaded: Error building .* omp.h: No such file; say torch"
    ):
        optimizer.deepspeed_adamw(optimizer.param_groups(parameters(5), SECTION), SECTION, CPU)
