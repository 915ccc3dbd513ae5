"""Files of tensors, read without a mapping and without running anything."""

import pytest
import torch
from safetensors.torch import save_file

from megacode.checkpoint.convert.stored import open_stored


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_come_back(tmp_path, suffix, dtype):
    whole = torch.randn(7, 6).to(dtype)
    tensors = {"whole": whole, "one": torch.ones(3, dtype=dtype), "more": torch.randn(2, 3, 4).to(dtype)}
    path = tmp_path / f"file.{suffix}"
    if suffix == "pth":  # of a storage that is shared, of a part of one, of one that lies otherwise
        tensors |= {"turned": whole.t(), "part": whole[2:5], "columns": whole[:, 1:3]}
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    file = open_stored(path)
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert set(file.dtypes.values()) == {dtype}
    for name, tensor in tensors.items():
        read = file.read(name)
        assert read.is_contiguous()
        assert torch.equal(read, tensor)
