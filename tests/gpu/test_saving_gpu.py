"""A checkpoint's copy from a GPU to pinned host memory, through two buffers and a stream of its own."""

import gc

import pytest
import torch
from support.saving import ALONE

from megacode.checkpoint.store import Share
from megacode.engine.gather import _Landing
from megacode.model.layers import Slice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PARTS = {f"model.layers.{number}.w": Slice((number % 3 + 1, 1 << 20), 0.02) for number in range(12)}
"""Of 4 to 12 MB: long enough that the host is ahead of the copies."""


def copy(share, sources, device):
    """Fill a share as `Gatherer` does where one data rank keeps all, each piece after a computation that takes time."""

    def gather(pieces):
        landing = _Landing(max(into.numel() for *_, into in pieces), device)
        for piece in pieces:
            name, key, _, into = piece
            for stretch in landing.stretches(into.numel()):
                with landing.next([piece], stretch) as target:
                    torch.cuda._sleep(1_000_000)
                    target.copy_(sources[name, key].view(-1)[stretch.start : stretch.stop])
        landing.finish()

    share.copy(gather)


def test_what_lands_is_what_the_device_had():
    device = torch.device("cuda", torch.cuda.current_device())
    share = Share(PARTS, ALONE, pinned=True)
    for _ in range(3):  # the memory stays from one save to the next
        sources = {place: torch.randn(value.shape, device=device) for place, value in share.values.items()}
        copy(share, sources, device)
        for source in sources.values():
            source.zero_()  # training goes on
        again = {place: value.clone() for place, value in share.values.items()}
        torch.cuda.synchronize()
        assert all(torch.equal(again[place], value) for place, value in share.values.items()), "it came too late"
        assert all(float(value.abs().max()) > 0 for value in share.values.values())


def test_each_tensor_lands_in_its_place():
    device = torch.device("cuda", torch.cuda.current_device())
    share = Share(PARTS, ALONE, pinned=True)
    sources = {place: torch.randn(value.shape, device=device) for place, value in share.values.items()}
    copy(share, sources, device)
    for place, value in share.values.items():
        assert torch.equal(value, sources[place].cpu()), place


def test_the_memory_is_pinned_as_long_as_the_share_lives():
    share = Share(PARTS, ALONE, pinned=True)
    value = next(iter(share.values.values()))
    assert value.is_pinned()
    del share
    gc.collect()
    assert not value.is_pinned()
