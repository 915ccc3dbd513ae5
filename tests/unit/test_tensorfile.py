"""Safetensors files written tensor by tensor: safetensors reads them, and the hash is the file's."""

import hashlib
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from megacode.checkpoint.tensorfile import TensorFile, sha256

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a.weight": torch.randn(5, 4, dtype=torch.bfloat16),
    "half": torch.randn(7).half(),
    "none": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
}
DECLARED = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_safetensors_reads_what_is_written(tmp_path):
    with TensorFile(tmp_path / "x.safetensors", DECLARED, {"step": "3"}) as file:
        for name, tensor in TENSORS.items():
            file.write(name, tensor)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (file.num_bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "step": "3"}


def test_a_view_is_written_as_it_looks(tmp_path):
    tensor = torch.arange(12.0).view(3, 4)
    with TensorFile(tmp_path / "x", {"t": (torch.float32, (4, 2))}) as file:
        file.write("t", tensor.t()[:, 1:])
    assert torch.equal(load_file(tmp_path / "x")["t"], tensor.t()[:, 1:])
    assert sha256(tensor.t()[:, 1:]) == sha256(tensor.t()[:, 1:].clone())


def test_one_tensor_is_laid_out_as_safetensors_does(tmp_path):
    with TensorFile(tmp_path / "x", {"t": (torch.float32, (3,))}) as file:
        file.write("t", torch.ones(3))
    assert (tmp_path / "x").read_bytes() == save({"t": torch.ones(3)}, {"format": "pt"})


def test_what_was_declared_must_come(tmp_path):
    file = TensorFile(tmp_path / "x", DECLARED)
    with pytest.raises(AssertionError, match="half is written where b"):
        file.write("half", TENSORS["half"])
    file = TensorFile(tmp_path / "y", DECLARED)
    for name in list(TENSORS)[:-1]:
        file.write(name, TENSORS[name])
    with pytest.raises(AssertionError, match="scalar was declared"):
        file.close()
    with pytest.raises(FileExistsError):
        TensorFile(tmp_path / "x", DECLARED)


def test_a_full_disk_is_an_error_of_the_write(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        file = TensorFile(tmp_path / "x", {"t": (torch.float32, (4096,))})
        with pytest.raises(OSError, match="File too large"):
            file.write("t", torch.ones(4096))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
