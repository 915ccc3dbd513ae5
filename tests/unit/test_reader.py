"""Reading parts of parameters, whatever slices they were written in."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.training import recipe

from megacode.checkpoint.reader import CheckpointReader, sealed
from megacode.checkpoint.tensorfile import TensorFile
from megacode.errors import UserError
from megacode.model.layers import Slice

WHOLE = torch.arange(7 * 5.0).view(7, 5)


def write(folder, dim, cuts, stored=torch.float32, **manifest):
    """WHOLE as a checkpoint's only tensor, cut at `cuts` along `dim`, a file each; dim None: in one."""
    bounds = [0, *sorted(cuts), WHOLE.shape[dim]] if dim is not None else [0, 0]
    pieces = list(itertools.pairwise(bounds))
    folder.mkdir(exist_ok=True)
    for rank, (start, stop) in enumerate(pieces):
        part = (WHOLE if dim is None else WHOLE.narrow(dim, start, stop - start)).to(stored)
        path = folder / f"weights_{rank:05d}.safetensors"
        path.unlink(missing_ok=True)
        with TensorFile(path, {"w": (stored, tuple(part.shape))}) as file:
            file.write("w", part)
    slices = [{"rank": rank, "start": start, "stop": stop} for rank, (start, stop) in enumerate(pieces)]
    progress = {"step": 1, "next_sample": 0, "adam_step": 1, "seed": 0, "sequence_length": 8, "num_tokens": 0}
    content = {
        "format": 1, "progress": progress, "precision": "bf16", "model": recipe().model.model_dump(mode="json"),
        "files": {}, "tensors": {"w": {"shape": list(WHOLE.shape), "dim": dim, "slices": slices}}, **manifest,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(content))
    return CheckpointReader(folder)


def test_a_manifest_that_was_changed_is_damaged(tmp_path):
    write(tmp_path, None, [])
    path = tmp_path / "manifest.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps(sealed(old), indent=3))
    CheckpointReader(tmp_path)
    for change in ({"progress": {**old["progress"], "step": 2}}, {"files": {"x": {"bytes": 1, "sha256": ""}}}):
        path.write_text(json.dumps({**sealed(old), **change}))
        with pytest.raises(UserError, match=r"manifest.json is damaged \(its checksum differs\); "):
            CheckpointReader(tmp_path)


@given(data=st.data())
def test_any_part_of_any_slices(tmp_path_factory, data):
    written = data.draw(st.sampled_from([None, 0, 1]))
    cuts = [] if written is None else data.draw(st.sets(st.integers(1, WHOLE.shape[written] - 1)))
    asked = data.draw(st.sampled_from([None, 0, 1]))
    part = Slice(tuple(WHOLE.shape), 1.0)
    want = WHOLE
    if asked is not None:
        start, stop = sorted(data.draw(st.sets(st.integers(0, WHOLE.shape[asked]), min_size=2, max_size=2)))
        part = Slice(tuple(WHOLE.shape), 1.0, asked, start, stop)
        want = WHOLE.narrow(asked, start, stop - start)
    reader = write(tmp_path_factory.getbasetemp() / "parts", written, cuts)
    assert torch.equal(reader.read_part("w", part), want)
    assert torch.equal(reader.read("w"), WHOLE)
    first, last = sorted(data.draw(st.sets(st.integers(0, len(want)), min_size=2, max_size=2)))
    assert torch.equal(reader.read_part("w", part, rows=range(first, last)), want[first:last])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_other_types_are_read_as_fp32(tmp_path, name, dtype):
    reader = write(tmp_path, 0, {3}, dtype, dtype=name, optimizer=None)
    assert (reader.dtype, reader.optimizer) == (dtype, None)
    assert torch.equal(reader.read("w"), WHOLE)
    assert reader.read("w").dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "damaged"), ("[]", "damaged"), ("{", "not JSON"), ('{"format": 1}', "damaged"),
        ('{"format": 1, "tensors": 3}', "damaged"), ('{"format": 2}', "format 2"), ("\xff", "not JSON"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none_is_told_in_a_line(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message) as error:
        CheckpointReader(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/manifest.json ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil", [
    lambda content: content["progress"].update(extra=1), lambda content: content["progress"].pop("step"),
    lambda content: content["model"].update(hidden="wide"), lambda content: content.update(dtype="fp8"),
    lambda content: content["tensors"]["w"].pop("slices"), lambda content: content.update(files=[]),
])  # fmt: skip
def test_a_manifest_with_a_part_that_is_none_is_told_in_a_line(tmp_path, spoil):
    content = write(tmp_path, 0, {3}).manifest
    spoil(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest.json is damaged") as error:
        CheckpointReader(tmp_path)
    assert "\n" not in str(error.value)


def test_a_slice_that_is_missing_is_told(tmp_path):
    reader = write(tmp_path, 0, {3})
    reader.manifest["tensors"]["w"]["slices"].pop()
    with pytest.raises(UserError, match=r"manifest.json lacks slices of w"):
        reader.read("w")
    (tmp_path / "weights_00000.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"weights_00000.safetensors cannot be read"):
        reader.read("w")
