"""A model of the same structure, smaller: to check a large recipe on a small machine. Pure arithmetic."""

import math
from collections.abc import Iterable

from megacode.recipe import ModelSection, ParallelSection

SMALLEST_HEAD_DIM = 8
FFN_MULTIPLE = 8


def shrink(model: ModelSection, factor: float, layouts: Iterable[ParallelSection] = ()) -> dict[str, int]:
    """The keys of a model that is `factor` times narrower and shallower, and their values.

    Queries per key-value head stay, and so does head_dim, as long as the width allows it. There is a layer for every
    stage of the layouts and a key-value head for every tensor rank, where the model itself has them. The vocabulary
    stays: it is the data's.

    Args:
        model: the model.
        factor: at least 1.
        layouts: what must be able to share the smaller model, as it can share this one.
    """
    assert factor >= 1
    layouts = list(layouts)
    num_stages = max((p.pipeline * p.virtual_stages for p in layouts), default=1)
    tensor = math.lcm(*(p.tensor for p in layouts))
    kv_heads = _multiple(model.kv_heads / factor, tensor, model.kv_heads)
    heads = kv_heads * (model.heads // model.kv_heads)
    fitting = max(SMALLEST_HEAD_DIM, int(model.hidden / factor / heads) // 2 * 2)
    head_dim = min(model.head_dim, fitting)
    return {
        "layers": min(model.layers, max(num_stages, round(model.layers / factor))),
        "hidden": heads * head_dim,
        "heads": heads,
        "kv_heads": kv_heads,
        "ffn": _multiple(model.ffn / factor, math.lcm(FFN_MULTIPLE, tensor), model.ffn),
    }


def _multiple(wanted: float, of: int, largest: int) -> int:
    """The multiple of `of` below `wanted`, or `of` itself; where there is none up to `largest`, that."""
    return min(largest, max(1, int(wanted) // of) * of)
