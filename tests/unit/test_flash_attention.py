"""The kernels of flash attention: their results under Triton's interpreter, and what its compiler makes of them."""

import os
import re
import subprocess

import pytest
import torch
from support.flash import CASES, PACKED, assert_as_exact_as_the_twin
from support.triton_offline import compile_for_hopper, interpret, tool

from megacode.kernels.flash_attention import _TILES, Tile, _power_of_two

pytest.importorskip("triton", reason="the interpreter and the compiler are part of triton")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Every case computed in a process of its own, under the interpreter."""
    return interpret("support.flash", tmp_path_factory.mktemp("triton") / "interpreted.pt")


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_as_exact_as_those_of_torch(interpreted, name):
    assert_as_exact_as_the_twin(interpreted[name], CASES[name], CASES[name].inputs())


@pytest.mark.parametrize("document", [0, 2])
def test_nothing_of_a_document_reaches_another(interpreted, document):
    start, stop = PACKED.bounds[document : document + 2]
    others = [i for i in range(PACKED.sequence) if not start <= i < stop]
    for key, whole in interpreted["packed"].items():
        of_tokens = whole.transpose(1, 2) if key == "lse" else whole
        spoilt = interpreted["spoilt"][document][key]
        spoilt = spoilt.transpose(1, 2) if key == "lse" else spoilt
        assert spoilt[:, start:stop].isnan().all(), key
        assert torch.equal(spoilt[:, others], of_tokens[:, others]), key


@pytest.mark.parametrize("document", [0, 1, 2, 4])
def test_a_document_does_not_depend_on_what_it_is_packed_with(interpreted, document):
    start, stop = PACKED.bounds[document : document + 2]
    for key, whole in interpreted["packed"].items():
        part = whole[:, :, start:stop] if key == "lse" else whole[:, start:stop]
        assert torch.equal(part, interpreted["alone"][document][key]), key


def test_triton_is_not_imported_before_it_is_used(interpreted):
    assert not interpreted["imported"]


# ---- the compiler, which needs no GPU

SHARED = 227 * 1024
"""Bytes of shared memory that a block of Hopper can have."""


def compiled(name: str, tile: Tile, dtype: str, head_dim: int, packed: bool):
    """(PTX, bytes of shared memory, what ptxas says) of a kernel with 64 heads on 8 kv heads."""
    from megacode.kernels import flash_attention_kernels

    constants = {"heads": 64, "kv_heads": 8, "head_dim": head_dim, "head_tile": _power_of_two(head_dim)}
    constants |= {"queries_tile": tile.queries, "keys_tile": tile.keys}
    types = dict.fromkeys(("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v"), f"*{dtype}")
    types |= dict.fromkeys(("lse", "delta", "grad_lse"), "*fp32") | {"scale": "fp32"}
    if packed:
        types |= {"bounds": "*i32", "bounds_k": "*i32"}
    else:
        constants |= {"bounds": None, "bounds_k": None}
    kernel = getattr(flash_attention_kernels, name)
    made = compile_for_hopper(kernel, types, constants, num_warps=tile.warps, num_stages=tile.stages)
    command = [tool("ptxas"), "-v", "--gpu-name=sm_90a", "-", "-o", os.devnull]
    said = subprocess.run(command, input=made.asm["ptx"], capture_output=True, text=True, check=True)
    return made.asm["ptx"], made.metadata.shared, said.stdout + said.stderr


@pytest.mark.parametrize("kernel", ["forward", "grad_q", "grad_kv"])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "packed"),
    [("bf16", 128, True), ("bf16", 128, False), ("bf16", 64, True), ("fp32", 128, True)],
)
def test_the_tiles_fit_hopper(kernel, dtype, head_dim, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = getattr(_TILES[2 if dtype == "bf16" else 4, head_dim], kernel)
    ptx, shared, said = compiled(kernel, tile, dtype, head_dim, packed)
    assert shared <= SHARED
    # The sums of grad_kv take half of the registers in bf16; what little it spills is mostly outside of its loops.
    spilled = int(re.search(r"(\d+) bytes spill loads", said)[1])
    assert spilled <= {"grad_kv": 1024, "grad_q": 32}.get(kernel, 0), said
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*", ptx)
    if tile.stages > 1:
        assert sum("0x10" in copy for copy in copies) >= 4  # 16 bytes a thread; 4 only for log-sum-exp and delta
    else:
        assert not copies
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= 4
    if dtype == "bf16":
        assert "wgmma.mma_async" in ptx
        assert "serialized" not in said, said  # it says so where it lets no two tensor core instructions overlap
    else:
        assert not re.search(r"wgmma|mma\.sync", ptx)  # IEEE fp32: no tensor cores
