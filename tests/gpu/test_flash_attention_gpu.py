"""The compiled kernels of flash attention against torch's attention and float64, at sizes of the table's tiles."""

from dataclasses import replace

import pytest
import torch
from support.flash import (
    CASES,
    PACKED,
    Case,
    alone,
    assert_as_exact_as_the_twin,
    differentiate,
    spoilt,
)

from megacode.kernels.flash_attention import flash_attention_with_lse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

LARGE = {
    "long": Case(1500, heads=4, head_dim=128, batch=2),
    "long_grouped": Case(1024, heads=8, kv_heads=1, head_dim=128, layout="fused"),
    "long_padded": Case(700, head_dim=96),
    "long_narrow": Case(1153, kv_heads=1, batch=2),
    "long_more_keys": Case(513, keys=1290, head_dim=128, batch=2, kv_heads=1),
    "long_documents": Case(2048, heads=4, head_dim=128, bounds=(0, 1, 129, 129, 700, 1980, 2048), layout="fused"),
    "many_documents": Case(1800, head_dim=128, bounds=tuple(range(0, 1801, 3))),
}
LARGE |= {f"{name}_bf16": replace(case, dtype=torch.bfloat16) for name, case in LARGE.items()}
PACKS = [replace(PACKED, dtype=dtype, head_dim=128) for dtype in (torch.float32, torch.bfloat16)]
PACKS += [replace(pack, sequence=1400, bounds=(0, 300, 310, 1100, 1100, 1400)) for pack in PACKS]


@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_results_and_gradients_are_as_exact_as_those_of_torch(name):
    case = (CASES | LARGE)[name]
    inputs = case.inputs("cuda")
    first = differentiate(flash_attention_with_lse, case, inputs)
    assert_as_exact_as_the_twin(first, case, inputs)
    for _ in range(3):
        for key, again in differentiate(flash_attention_with_lse, case, inputs).items():
            assert torch.equal(again, first[key]), key


@pytest.mark.parametrize("pack", PACKS, ids=str)
def test_documents_depend_on_nothing_but_themselves(pack):
    inputs = pack.inputs("cuda")
    whole = differentiate(flash_attention_with_lse, pack, inputs)
    broken = differentiate(flash_attention_with_lse, pack, spoilt(pack, 2, inputs))
    for document in (0, 1, 4):
        part = slice(*pack.bounds[document : document + 2])
        single = alone(flash_attention_with_lse, pack, document, inputs)
        for key in whole:
            ours, theirs = (x[key].movedim(-1 if key == "lse" else 1, 0)[part] for x in (whole, broken))
            assert torch.equal(ours, theirs), key
            assert torch.equal(ours, single[key].movedim(-1 if key == "lse" else 1, 0)), key


def test_nothing_waits_for_the_device():
    case = replace(LARGE["long_documents"], dtype=torch.bfloat16)
    inputs, bounds, weights = case.inputs("cuda"), case.cu_seqlens("cuda"), case.weights("cuda")[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attention_with_lse(*inputs, *bounds)[0].backward(weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
