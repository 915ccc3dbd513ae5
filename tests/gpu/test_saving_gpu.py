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


class Lander:
    """Fills a share as `Gatherer` does where one data rank keeps all; each piece comes after a computation."""

    def __init__(self):
        self.device, self.sources = torch.device("cuda", torch.cuda.current_device()), {}

    def keepers(self):
        return dict.fromkeys(PARTS, 0)

    def gather(self, pieces):
        landing = _Landing(max(into.numel() for *_, into in pieces), self.device)
        for piece in pieces:
            name, key, _, into = piece
            for stretch in landing.stretches(into.numel()):
                with landing.next([piece], stretch) as target:
                    torch.cuda._sleep(1_000_000)
                    target.copy_(self.sources[name, key].view(-1)[stretch.start : stretch.stop])
        landing.finish()

    def change(self, share):
        """New random numbers, of which the share has a copy then."""
        self.sources = {place: torch.randn(value.shape, device=self.device) for place, value in share.values.items()}
        share.copy()
        return self.sources


def test_what_lands_is_what_the_device_had():
    lander = Lander()
    share = Share(PARTS, lander, ALONE, pinned=True)
    for _ in range(3):  # the memory stays from one save to the next
        for source in lander.change(share).values():
            source.zero_()  # training goes on
        again = {place: value.clone() for place, value in share.values.items()}
        torch.cuda.synchronize()
        assert all(torch.equal(again[place], value) for place, value in share.values.items()), "it came too late"
        assert all(float(value.abs().max()) > 0 for value in share.values.values())


def test_each_tensor_lands_in_its_place():
    lander = Lander()
    share = Share(PARTS, lander, ALONE, pinned=True)
    sources = lander.change(share)
    for place, value in share.values.items():
        assert torch.equal(value, sources[place].cpu()), place


def test_the_memory_is_pinned_as_long_as_the_share_lives():
    share = Share(PARTS, Lander(), ALONE, pinned=True)
    value = next(iter(share.values.values()))
    assert value.is_pinned()
    del share
    gc.collect()
    assert not value.is_pinned()
