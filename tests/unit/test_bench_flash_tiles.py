"""The benchmark of flash attention's tiles, as far as it goes without a GPU."""

import subprocess
import sys

import pytest
import torch

from megacode.kernels.flash_attention import tiles_of
from megacode.tools.bench import flash_tiles


@pytest.mark.parametrize("head_dim", [64, 128])
def test_candidates_hold_the_table_and_change_one_kernel_each(head_dim):
    usual, found = tiles_of(2, head_dim), list(flash_tiles.candidates(head_dim))
    assert len(set(found)) == len(found)
    for kernel in flash_tiles.KERNELS:
        mine = [getattr(tiles, kernel) for name, tiles in found if name == kernel]
        assert getattr(usual, kernel) in mine
        others = [name for name in flash_tiles.KERNELS if name != kernel]
        assert all(
            getattr(tiles, other) == getattr(usual, other)
            for name, tiles in found
            if name == kernel
            for other in others
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "megacode.tools.bench.flash_tiles"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: there is no CUDA device that torch sees; tiles are measured on one\n"
