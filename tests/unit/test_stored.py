"""Files of tensors, read without a mapping and without running anything."""

import zipfile

import pytest
import torch
from safetensors.torch import save_file

from megacode.checkpoint.convert import stored
from megacode.checkpoint.convert.library import files_by_name, read_by_library
from megacode.checkpoint.convert.stored import check_tensors, open_stored
from megacode.errors import UserError


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
        assert torch.equal(read_by_library(path, name), tensor)
    assert files_by_name([path, path]) == {name: [path, path] for name in tensors}


def test_a_compressed_archive_is_named(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(tmp_path / "file.bin", "w") as archive:
        for entry in plain.infolist():
            archive.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert torch.load(tmp_path / "file.bin")["a"].tolist() == [0] * 1000
    with pytest.raises(UserError, match=r"file\.bin is compressed"):
        open_stored(tmp_path / "file.bin")


@pytest.mark.parametrize("summed", [True, False])
def test_a_changed_byte_is_found_by_the_records_own_checksum(tmp_path, summed, monkeypatch):
    """Of a file that was written with checksums, as torch.save does if nobody says otherwise."""
    monkeypatch.setattr(stored, "_SUMMED_BYTES", 64)
    whole, path = torch.randn(40, 6), tmp_path / "file.pth"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(summed)
    torch.save({"whole": whole, "part": whole[2:5], "other": torch.ones(4)}, path)
    torch.serialization.set_crc32_options(before)
    content = bytearray(path.read_bytes())
    place = content.index(whole.numpy().tobytes()) + 4 * 6 * 30  # in a row that `part` has not
    content[place] ^= 1
    path.write_bytes(content)
    file = open_stored(path)
    assert torch.equal(file.read("other"), torch.ones(4))
    for name in ("whole", "part"):
        if summed:
            with pytest.raises(
                UserError, match=rf"{name} in {path} is damaged \(its CRC-32 differs\); fetch the file again"
            ):
                file.read(name)
        else:
            assert torch.equal(file.read(name), torch.load(path)[name])


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.bin"])
def test_a_file_that_vanished_is_one_line(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        read_by_library(tmp_path / name, "a")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float64, "fp64"), (torch.int8, "int8"), (torch.uint8, "uint8"), (torch.bool, "bool")]
)
def test_a_type_has_one_name_in_all_formats(tmp_path, suffix, dtype, name):
    path = tmp_path / f"file.{suffix}"
    for first, wanted in ((torch.bfloat16, "bf16"), (dtype, "bf16, fp16 or fp32")):
        tensors = {"a": torch.ones(2, dtype=first), "b": torch.ones(2, dtype=dtype)}
        torch.save(tensors, path) if suffix == "pth" else save_file(tensors, path)
        file = open_stored(path)
        found = {each: (path, file.shapes[each], file.dtypes[each]) for each in tensors}
        with pytest.raises(UserError, match=f"in file.{suffix} is {name} instead of {wanted}[:( ]"):
            check_tensors(found, file.shapes)
