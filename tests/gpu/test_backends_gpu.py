"""Every backend that serves on this GPU, as the doctor examines it: against fp64, and for leaks between documents."""

import shutil
import subprocess
import sys

import pytest
import torch

from megacode.doctor import kernels, leakage
from megacode.kernels import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

CUDA = torch.device("cuda")
BACKENDS = [(operation, name) for operation, backends in dispatch.TABLE.items() for name in backends]
DTYPES = [torch.bfloat16, torch.float32]


def serving(operation: str, name: str, dtype: torch.dtype, **shape):
    backend = dispatch.TABLE[operation][name]
    refusal = backend.refusal(dispatch.task(CUDA, dtype, **shape))
    if refusal is not None:
        pytest.skip(refusal)
    return backend.function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operation", "name"), BACKENDS)
def test_a_backend_computes_what_its_twin_does(operation, name, dtype):
    function = serving(operation, name, dtype)
    packed = dispatch.TABLE[operation][name].refusal(dispatch.task(CUDA, dtype, segments=True)) is None
    finding = kernels.check_twin(operation, name, function, CUDA, dtype, packed)
    assert finding.state == "ok", finding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", dispatch.TABLE["attention"])
def test_documents_do_not_leak(name, dtype):
    function = serving("attention", name, dtype, segments=True, head_dim=leakage.HEAD_DIM)
    finding = leakage.check_attention(name, function, CUDA, dtype)
    assert finding.state == "ok", finding


@pytest.mark.parametrize("operation", dispatch.TABLE)
def test_auto_takes_a_fast_one(operation):
    assert dispatch.choose(operation, dispatch.task(CUDA, torch.bfloat16)).name != "torch"


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is part of the CUDA toolkit")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("operation", dispatch.TABLE)
def test_the_sanitizer_finds_nothing_in_the_triton_kernels(operation, tool):
    check = (
        "import torch; from megacode.doctor import kernels; from megacode.kernels import dispatch;"
        f"function = dispatch.TABLE['{operation}']['triton'].function;"
        f"found = kernels.check_twin('{operation}', 'triton', function, torch.device('cuda'), torch.bfloat16);"
        "assert found.state == 'ok', found"
    )
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", check]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
