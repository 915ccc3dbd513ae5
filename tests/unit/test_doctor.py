"""Each check of the doctor that needs one process, right and wrong."""

import json
import os
import sys

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

from megacode.cli import app
from megacode.data.packing import join
from megacode.doctor import kernels, leakage, machine, report, versions
from megacode.doctor.finding import Finding
from megacode.kernels import dispatch
from megacode.kernels.attention import Segments, attention_torch
from megacode.kernels.rope import rope_torch

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def states(findings):
    return {finding.name: finding.state for finding in findings}


# ---- versions


def test_what_is_installed_here_is_right():
    findings = list(versions.check_packages())
    assert not [finding for finding in findings if finding.state == "WRONG"]
    assert states(findings)["torch"] == "ok"
    assert versions.check_deepspeed().state == "ok"


@pytest.mark.parametrize(
    ("requirement", "text"), [("no-such-package", "is not installed"), ("torch>=1000", "needs >=1000")]
)
def test_a_required_package_that_is_missing_or_old(requirement, text):
    finding = versions.check_package(Requirement(requirement))
    assert finding.state == "WRONG"
    assert text in finding.text
    assert "pip install" in finding.mend


def test_megacode_itself_is_not_installed(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda name: None)
    assert states(versions.check_packages())["megacode"] == "WRONG"


def test_a_package_that_does_not_import(monkeypatch):
    def fail(name):
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(versions.importlib, "import_module", fail)
    finding = versions.check_package(Requirement("torch"))
    assert (finding.state, "libcudart.so.12" in finding.text) == ("WRONG", True)


def test_another_deepspeed(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda name: "0.20.0")
    finding = versions.check_deepspeed()
    assert finding.state == "WRONG"
    assert finding.mend == "pip install deepspeed==0.19.8"
    monkeypatch.setattr(versions, "installed", lambda name: None)
    assert versions.check_deepspeed().state == "WRONG"


def test_flash_attn_is_never_needed(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda name: None)
    assert versions.check_flash_attn(cuda=False).state == "skipped"
    missing = versions.check_flash_attn(cuda=True)
    assert missing.state == "missing"
    assert "pip install flash-attn" in missing.mend


def test_another_projects_apex(tmp_path, monkeypatch):
    assert versions.check_apex().mend is None
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("import no_such_web_framework")
    monkeypatch.syspath_prepend(tmp_path)
    finding = versions.check_apex()
    assert (finding.state, finding.mend) == ("missing", "pip uninstall apex")
    assert "apex" not in sys.modules


# ---- the machine


def test_a_driver_without_a_gpu_in_torch_is_wrong(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "WRONG" not in states(machine.check_devices(cuda=False, driver=None)).values()
    assert states(machine.check_devices(cuda=False, driver="580.95.05"))["torch's build"] == "WRONG"


def test_a_small_shared_memory_matters_on_gpus_only():
    container = 64 * 2**20
    assert machine.check_shared_memory(cuda=False, size_bytes=container).state == "ok"
    assert machine.check_shared_memory(cuda=True, size_bytes=2**31).state == "ok"
    assert "--shm-size" in machine.check_shared_memory(cuda=True, size_bytes=container).mend


def test_low_limits_matter_on_gpus_only(monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (1024, 1024))
    assert set(states(machine.check_limits(cuda=False)).values()) == {"ok"}
    assert states(machine.check_limits(cuda=True)) == {"ulimit memlock": "missing", "ulimit nofile": "missing"}
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (machine.resource.RLIM_INFINITY, 0))
    assert states(machine.check_limits(cuda=True))["ulimit memlock"] == "ok"


def test_a_compiler_is_needed_on_gpus_only(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    on_cpu, on_gpu = ({f.name: f for f in machine.check_compilers(cuda)} for cuda in (False, True))
    assert all(finding.mend is None and "not needed" in finding.text for finding in on_cpu.values())
    assert [name for name, finding in on_gpu.items() if finding.mend] == ["gcc"]


def test_a_gpu_needs_nccl(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert machine.check_nccl(cuda=False).state == "skipped"
    assert machine.check_nccl(cuda=True).state == "WRONG"


@pytest.mark.parametrize(
    ("name", "value", "state"),
    [
        ("GLOO_SOCKET_IFNAME", "lo", "ok"),
        ("GLOO_SOCKET_IFNAME", "eth", "WRONG"),
        ("GLOO_SOCKET_IFNAME", "ib0", "WRONG"),
        ("NCCL_SOCKET_IFNAME", "eth", "ok"),
        ("NCCL_SOCKET_IFNAME", "=eth", "WRONG"),
        ("NCCL_SOCKET_IFNAME", "=eth0", "ok"),
        ("NCCL_SOCKET_IFNAME", "ib,eth", "ok"),
        ("NCCL_SOCKET_IFNAME", "ib", "WRONG"),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", "ok"),
        ("NCCL_SOCKET_IFNAME", "^eth,lo", "WRONG"),
    ],
)
def test_an_interface_that_does_not_exist(name, value, state):
    assert states(machine.check_variables({name: value}, ["lo", "eth0"]))[name] == state


def test_a_killed_build_leaves_a_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert machine.extension_folder() == tmp_path
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    assert [finding.state for finding in machine.check_extension_locks(tmp_path)] == ["ok"]
    builder = os.open(lock, os.O_CREAT | os.O_EXCL)
    assert [finding.state for finding in machine.check_extension_locks(tmp_path)] == ["ok"]
    os.close(builder)
    (finding,) = machine.check_extension_locks(tmp_path)
    assert (finding.state, finding.mend) == ("WRONG", f"rm {lock}")


# ---- kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", dispatch.TABLE)
def test_the_twins_agree_with_themselves(operation, dtype):
    twin = dispatch.TABLE[operation]["torch"].function
    assert kernels.check_twin(operation, "torch", twin, CPU, dtype).state == "ok"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_that_errs_is_found(dtype):
    def late(q, k, positions, theta, head_dim):
        return rope_torch(q, k, positions + 1, theta, head_dim)

    def without_group(q, k, v, segments):
        return attention_torch(q, k.flip(2), v, segments)

    def backward_errs(q, k, v, segments):
        return attention_torch(q, k, v + 0.05 * (v - v.detach()), segments)

    def fails(*arguments):
        raise RuntimeError("no kernel image is available")

    for operation, function in [("rope", late), ("attention", without_group), ("attention", backward_errs)]:
        finding = kernels.check_twin(operation, "x", function, CPU, dtype)
        assert (finding.state, "fails" in finding.text) == ("WRONG", False)
    finding = kernels.check_twin("rope", "x", fails, CPU, dtype)
    assert (finding.state, "no kernel image" in finding.text) == ("WRONG", True)
    nothing = kernels.check_twin("rope", "x", lambda *x: tuple(y * torch.nan for y in rope_torch(*x)), CPU, dtype)
    assert nothing.state == "WRONG"


@pytest.mark.parametrize("documents", [False, True])
def test_a_mask_that_begins_at_the_first_key_is_found(documents):
    """As flash-attn's below 2.1: right where there are as many queries as keys."""

    def first_keys(x, lengths, lengths_k):
        parts = x.flatten(0, 1).split(lengths_k)
        return torch.cat([part[:count] for part, count in zip(parts, lengths, strict=True)])

    def aligned_to_the_first(q, k, v, segments):
        if segments is None and not documents:
            return attention_torch(q, k[:, : q.shape[1]], v[:, : q.shape[1]], None)
        if segments is None or not documents:
            return attention_torch(q, k, v, segments)
        k, v = (first_keys(x, segments.lengths, segments.lengths_k)[None] for x in (k, v))
        return attention_torch(q, k, v, Segments.between(segments.cu_seqlens.tolist()))

    finding = kernels.check_twin("attention", "x", aligned_to_the_first, CPU, torch.float32)
    name = "documents with fewer queries than keys" if documents else "fewer queries than keys"
    assert (finding.state, finding.text.endswith(f"({name})")) == ("WRONG", True)


def test_every_operation_has_a_case():
    assert set(kernels.INPUTS) == set(dispatch.TABLE)


# ---- document masks


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_that_leaks_is_found(dtype):
    def check(attention):
        return leakage.check_attention("masks", attention, CPU, dtype)

    assert check(attention_torch).state == "ok"
    leaking = check(lambda q, k, v, segments: attention_torch(q, k, v, None))
    assert leaking.state == "WRONG"
    for what in ("output", "gradient of q", "gradient of k", "gradient of v", "gradient across documents"):
        assert what in leaking.text

    def late(q, k, v, segments):
        """Every bound a token late: a document sees the last token of the one before."""
        bounds = [] if segments is None else segments.cu_seqlens.tolist()
        shifted = segments and Segments.between([0, *(bound + 1 for bound in bounds[1:-1]), bounds[-1]])
        return attention_torch(q, k, v, shifted)

    assert check(late).state == "WRONG"
    blind = check(lambda q, k, v, segments: v.repeat_interleave(2, dim=2) + 0 * (q + k.repeat_interleave(2, dim=2)))
    assert (blind.state, "do not see each other" in blind.text) == ("WRONG", True)


def test_a_leak_in_the_backward_alone_is_found():
    def attention(q, k, v, segments):
        leak = attention_torch(q, k, v, None)
        return attention_torch(q, k, v, segments) + 1e-6 * (leak - leak.detach())

    finding = leakage.check_attention("masks", attention, CPU, torch.float32)
    assert (finding.state, "gradient across documents" in finding.text) == ("WRONG", True)


def test_a_backward_that_is_not_reproducible_is_no_leak():
    calls = []

    def attention(q, k, v, segments):
        calls.append(1)
        noise = 1 + 1e-7 * (len(calls) % 2)  # runs 1 and 2 differ by it, runs 1 and 3 do not
        return attention_torch(q, k, v, segments) + (noise - 1) * (q - q.detach())

    assert leakage.check_attention("masks", attention, CPU, torch.float32).state == "ok"


def test_packing_that_ignores_documents_is_found():
    assert leakage.check_packing(join).state == "ok"
    wrong = leakage.check_packing(lambda pieces, length, masks: join(pieces, length, document_masks=False))
    assert (wrong.state, wrong.text) == ("WRONG", "positions and labels do not stop at documents")


# ---- the command


def test_a_leak_makes_the_command_fail(monkeypatch, tmp_path):
    """The whole command on a machine whose attention ignores bounds: exit code 1, and the file says why."""
    torch_backend = dispatch.TABLE["attention"]["torch"]
    leaking = dispatch.Backend(torch_backend.refusal, lambda q, k, v, segments: attention_torch(q, k, v, None))
    monkeypatch.setitem(dispatch.TABLE["attention"], "torch", leaking)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    out = tmp_path / "doctor.json"
    result = CliRunner().invoke(app, ["doctor", "--quick", "--json", str(out)])
    assert result.exit_code == 1
    found = json.loads(out.read_text())
    assert found["exit_code"] == 1
    wrong = [f["name"] for findings in found["sections"].values() for f in findings if f["state"] == "WRONG"]
    assert wrong == ["masks fp32 by torch", "masks bf16 by torch"]
    assert "WRONG: masks fp32 by torch, masks bf16 by torch" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "\x1b" not in result.stdout


def test_a_sound_machine_makes_the_command_succeed(monkeypatch, tmp_path):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    result = CliRunner().invoke(app, ["doctor", "--quick"])
    assert result.exit_code == 0
    assert "Nothing here would train wrongly." in result.stdout
    assert list(
        dict.fromkeys(line for line in result.stdout.splitlines() if line.startswith(("versions", "kernels")))
    ) == [
        "versions",
        "kernels",
    ]


def test_broken_packages_end_the_examination(monkeypatch):
    monkeypatch.setattr(versions, "_requirements", lambda: [Requirement("no-such-package")])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "first mend the packages above" in result.stdout


def test_bad_use():
    assert CliRunner().invoke(app, ["doctor", "--processes", "1"]).exit_code == 2


def test_lines_are_short_and_mends_have_their_own(capsys):
    paper = report.Report()
    long = Finding("a name that is longer than its column", "WRONG", "word " * 40, "rm " + "x" * 30)
    paper.add("section", iter([long, Finding("short", "ok", "fine")]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= report.WIDTH
    assert [line.strip() for line in lines if "mend:" in line] == ["mend: rm " + "x" * 30]
    assert lines[-1] == f"ok      {'short':<{report.NAME_WIDTH}} fine"
    assert paper.exit_code == 1
