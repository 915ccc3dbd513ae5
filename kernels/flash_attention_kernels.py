"""The Triton kernels of `flash_attention`, which imports this module at its first call: importing it imports triton.

Names: first, first_k: a segment's first query and key in its row; queries, keys: how many it has; begin: where in the
segment a program's tile begins. The queries are the last of the segment's tokens: query i sees the keys up to
i + keys - queries. Offsets that grow with the number of tokens are 64 bits wide, those inside of a tile 32.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def kernel(function: Callable[..., None]) -> Any:
    """A Triton kernel that is not compiled anew for counts of 1 or multiples of 16, which differ between batches."""
    return triton.jit(function, do_not_specialize=["segments", "queries", "keys"])


def device(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return triton.jit(function)


@device
def place(
    slot: tl.tensor,
    bounds: tl.tensor,
    bounds_k: tl.tensor,
    segments: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    tile: tl.constexpr,
    of_keys: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The segment that tile number `slot` belongs to: (first, first_k, queries, keys, begin).

    Segment s, that begins at token b, has the tiles from number b // tile + s on, see `flash_attention._Launch.grid`.
    Its number is found by counting the segments whose first tile comes no later than `slot`, 256 at a time: a search
    by halves would wait for memory at each step.
    """
    if bounds is None:
        first, first_k, begin = tl.cast(0, tl.int64), tl.cast(0, tl.int64), slot * tile
    else:
        own = bounds_k if of_keys else bounds
        segment = -1
        for base in range(0, segments, 256):
            index = base + tl.arange(0, 256)
            bound = tl.load(own + index, mask=index < segments, other=0)
            segment += tl.sum(((bound // tile + index <= slot) & (index < segments)).to(tl.int32))
        begin = (slot - tl.load(own + segment) // tile - segment) * tile
        first, first_k = tl.load(bounds + segment).to(tl.int64), tl.load(bounds_k + segment).to(tl.int64)
        queries = (tl.load(bounds + segment + 1) - first).to(tl.int32)
        keys = (tl.load(bounds_k + segment + 1) - first_k).to(tl.int32)
    return first, first_k, queries, keys, begin


@device
def load(
    x: tl.tensor,
    stride: tl.tensor,
    rows: tl.tensor,
    tile: tl.constexpr,
    head_dim: tl.constexpr,
    head_tile: tl.constexpr,
    bounded: tl.constexpr,
) -> tl.tensor:
    """[tile, head_tile] of the rows from x on: zeros beyond head_dim and, if bounded, beyond `rows` rows."""
    row, column = tl.arange(0, tile)[:, None], tl.arange(0, head_tile)[None, :]
    source = x + row * stride + column
    if bounded:
        values = tl.load(source, mask=(row < rows) & (column < head_dim), other=0.0)
    elif head_dim != head_tile:
        values = tl.load(source, mask=column < head_dim, other=0.0)
    else:
        values = tl.load(source)
    return values


@device
def store(x: tl.tensor, stride: tl.tensor, rows: tl.tensor, values: tl.tensor, head_dim: tl.constexpr) -> None:
    """`load` the other way, bounded."""
    row, column = tl.arange(0, values.shape[0])[:, None], tl.arange(0, values.shape[1])[None, :]
    tl.store(x + row * stride + column, values.to(x.dtype.element_ty), mask=(row < rows) & (column < head_dim))


@kernel
def forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    bounds: tl.tensor,
    bounds_k: tl.tensor,
    segments: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    scale: tl.tensor,
    q_batch_stride: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_batch_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_batch_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    head_tile: tl.constexpr,
    queries_tile: tl.constexpr,
    keys_tile: tl.constexpr,
) -> None:
    """One program: a tile of queries of one head over all keys that they see."""
    slot = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries have the most keys and must not start last
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    kv_head = head // (heads // kv_heads)
    tokens = queries
    first, first_k, queries, keys, begin = place(slot, bounds, bounds_k, segments, queries, keys, queries_tile, False)
    if begin >= queries:
        return
    token = first + begin
    q += row * q_batch_stride + token * q_token_stride + head * q_head_stride
    k += row * k_batch_stride + first_k * k_token_stride + kv_head * k_head_stride
    v += row * v_batch_stride + first_k * v_token_stride + kv_head * v_head_stride

    index = tl.arange(0, queries_tile)
    q_tile = load(q, q_token_stride, queries - begin, queries_tile, head_dim, head_tile, True)
    peak = tl.full([queries_tile], float("-inf"), tl.float32)
    total = tl.zeros([queries_tile], tl.float32)
    sums = tl.zeros([queries_tile, head_tile], tl.float32)
    last = begin + index + keys - queries  # the last key that each query sees
    # Tiles of keys before `diagonal` are seen whole by every query; the others, at least one, are masked.
    diagonal = (begin + keys - queries) // keys_tile * keys_tile
    stop = tl.minimum(begin + queries_tile + keys - queries, keys)
    final = (stop - 1) // keys_tile * keys_tile
    binary = scale * 1.4426950408889634  # exp(x) = exp2(x * log2(e)), and exp2 is what the hardware has
    k_tile = load(k, k_token_stride, keys, keys_tile, head_dim, head_tile, True)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    scores, sums, total, peak, k, v = attend(
        *(scores, sums, total, peak, q_tile, k, v, 0, diagonal, keys, last, binary, k_token_stride, v_token_stride),
        *(head_dim, False),
    )
    scores, sums, total, peak, k, v = attend(
        *(scores, sums, total, peak, q_tile, k, v, diagonal, final, keys, last, binary, k_token_stride, v_token_stride),
        *(head_dim, True),
    )
    v_tile = load(v, v_token_stride, keys - final, keys_tile, head_dim, head_tile, True)
    sums, total, peak = absorb(hide(scores, final, last), v_tile, sums, total, peak, binary)
    out += ((row * tokens + token) * heads + head) * head_dim
    store(out, heads * head_dim, queries - begin, sums / total[:, None], head_dim)
    lse += (row * heads + head) * tokens + token
    tl.store(lse + index, (peak + tl.log2(total)) * 0.6931471805599453, mask=index < queries - begin)


@device
def attend(
    scores: tl.tensor,
    sums: tl.tensor,
    total: tl.tensor,
    peak: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    keys: tl.tensor,
    last: tl.tensor,
    binary: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    head_dim: tl.constexpr,
    masked: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A tile of queries over the keys from `start` to `stop`: the softmax's numerators, denominators, highest scores.

    k, v point to key `start`, and come back pointing to key `stop`. `scores` are those of the first tile, and come back
    as those of the tile after the last: each turn issues the next product of q and k before it needs the exponentials
    of this one, so that the tensor cores work meanwhile.
    """
    tile: tl.constexpr = scores.shape[1]
    for key in range(start, stop, tile):
        k += tile * k_stride
        k_tile = load(k, k_stride, keys - key - tile, tile, head_dim, q.shape[1], True)
        following = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        v_tile = load(v, v_stride, keys - key, tile, head_dim, q.shape[1], masked)
        if masked:
            scores = hide(scores, key, last)
        sums, total, peak = absorb(scores, v_tile, sums, total, peak, binary)
        v += tile * v_stride
        scores = following
    return scores, sums, total, peak, k, v


@device
def hide(scores: tl.tensor, key: tl.tensor, last: tl.tensor) -> tl.tensor:
    """-inf for keys behind the last that a query sees. The first is `key`."""
    return tl.where(key + tl.arange(0, scores.shape[1])[None, :] <= last[:, None], scores, float("-inf"))


@device
def absorb(
    scores: tl.tensor, v: tl.tensor, sums: tl.tensor, total: tl.tensor, peak: tl.tensor, binary: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The online softmax: takes a tile of keys into the sums. Peaks are to base 2."""
    # Every query sees key 0, so the first tile lifts every peak from -inf.
    higher = tl.maximum(peak, tl.max(scores, 1) * binary)
    weights = tl.exp2(scores * binary - higher[:, None])
    shrink = tl.exp2(peak - higher)
    total = total * shrink + tl.sum(weights, 1)
    sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
    return sums, total, higher


@kernel
def grad_q(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    grad_lse: tl.tensor,
    delta: tl.tensor,
    grad_q: tl.tensor,
    bounds: tl.tensor,
    bounds_k: tl.tensor,
    segments: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    scale: tl.tensor,
    q_batch_stride: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_batch_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_batch_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    head_tile: tl.constexpr,
    queries_tile: tl.constexpr,
    keys_tile: tl.constexpr,
) -> None:
    """One program: dQ of a tile of queries of one head; and their delta, which `grad_kv` reads.

    With P the weights and dP = dO V^T, softmax gives dS = P (dP - rowsum(P dP)), and that sum is rowsum(dO O) (Dao et
    al. 2022). A gradient of the log-sum-exp adds P times itself. delta = rowsum(dO O) - that gradient.
    """
    slot = tl.num_programs(0) - 1 - tl.program_id(0)  # as in forward
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    kv_head = head // (heads // kv_heads)
    tokens = queries
    first, first_k, queries, keys, begin = place(slot, bounds, bounds_k, segments, queries, keys, queries_tile, False)
    if begin >= queries:
        return
    token = first + begin
    q += row * q_batch_stride + token * q_token_stride + head * q_head_stride
    k += row * k_batch_stride + first_k * k_token_stride + kv_head * k_head_stride
    v += row * v_batch_stride + first_k * v_token_stride + kv_head * v_head_stride
    line = ((row * tokens + token) * heads + head) * head_dim
    statistic = (row * heads + head) * tokens + token

    index = tl.arange(0, queries_tile)
    rows = queries - begin
    q_tile = load(q, q_token_stride, rows, queries_tile, head_dim, head_tile, True)
    grad_tile = load(grad + line, heads * head_dim, rows, queries_tile, head_dim, head_tile, True)
    out_tile = load(out + line, heads * head_dim, rows, queries_tile, head_dim, head_tile, True)
    delta_tile = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    if grad_lse is not None:
        delta_tile -= tl.load(grad_lse + statistic + index, mask=index < rows, other=0.0)
    tl.store(delta + statistic + index, delta_tile, mask=index < rows)
    lse_tile = tl.load(lse + statistic + index, mask=index < rows, other=0.0) * 1.4426950408889634

    last = begin + index + keys - queries
    diagonal = (begin + keys - queries + 1) // keys_tile * keys_tile
    stop = tl.minimum(begin + queries_tile + keys - queries, keys)
    binary = scale * 1.4426950408889634
    sums = tl.zeros([queries_tile, head_tile], tl.float32)
    sums, k, v = attend_backward(
        *(sums, q_tile, grad_tile, lse_tile, delta_tile, k, v, 0, diagonal, keys, last, binary),
        *(k_token_stride, v_token_stride, head_dim, keys_tile, False),
    )
    sums, k, v = attend_backward(
        *(sums, q_tile, grad_tile, lse_tile, delta_tile, k, v, diagonal, stop, keys, last, binary),
        *(k_token_stride, v_token_stride, head_dim, keys_tile, True),
    )
    store(grad_q + line, heads * head_dim, rows, sums * scale, head_dim)


@device
def attend_backward(
    sums: tl.tensor,
    q: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    keys: tl.tensor,
    last: tl.tensor,
    binary: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    head_dim: tl.constexpr,
    keys_tile: tl.constexpr,
    masked: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """dQ / scale of a tile of queries from the keys from `start` to `stop`; k and v as in `attend`."""
    for key in range(start, stop, keys_tile):
        k_tile = load(k, k_stride, keys - key, keys_tile, head_dim, q.shape[1], masked)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        v_tile = load(v, v_stride, keys - key, keys_tile, head_dim, q.shape[1], masked)
        grad_weights = tl.dot(grad, tl.trans(v_tile), input_precision="ieee")
        if masked:
            scores = hide(scores, key, last)
        weights = tl.exp2(scores * binary - lse[:, None])
        grad_scores = weights * (grad_weights - delta[:, None])
        sums = tl.dot(grad_scores.to(k_tile.dtype), k_tile, sums, input_precision="ieee")
        k += keys_tile * k_stride
        v += keys_tile * v_stride
    return sums, k, v


@kernel
def grad_kv(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    bounds: tl.tensor,
    bounds_k: tl.tensor,
    segments: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    scale: tl.tensor,
    q_batch_stride: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_batch_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_batch_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    head_tile: tl.constexpr,
    queries_tile: tl.constexpr,
    keys_tile: tl.constexpr,
) -> None:
    """One program: dK and dV of a tile of keys of one kv head, from all queries that see one of them, head by head."""
    kv_head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    group: tl.constexpr = heads // kv_heads
    tokens, tokens_k = queries, keys
    slot = tl.program_id(0)  # the first keys are seen by the most queries
    first, first_k, queries, keys, begin = place(slot, bounds, bounds_k, segments, queries, keys, keys_tile, True)
    if begin >= keys:
        return
    token = first_k + begin
    k += row * k_batch_stride + token * k_token_stride + kv_head * k_head_stride
    v += row * v_batch_stride + token * v_token_stride + kv_head * v_head_stride
    k_tile = load(k, k_token_stride, keys - begin, keys_tile, head_dim, head_tile, True)
    v_tile = load(v, v_token_stride, keys - begin, keys_tile, head_dim, head_tile, True)
    k_sums = tl.zeros([keys_tile, head_tile], tl.float32)
    v_sums = tl.zeros([keys_tile, head_tile], tl.float32)

    first_query = begin + tl.arange(0, keys_tile) - (keys - queries)  # the first that sees each key
    start = tl.maximum(begin - (keys - queries), 0) // queries_tile * queries_tile
    # Tiles of queries from `diagonal` on see every key; only those before are masked.
    diagonal = tl.cdiv(tl.maximum(begin + keys_tile - 1 - (keys - queries), 0), queries_tile) * queries_tile
    for member in range(group):
        head = kv_head * group + member
        q_head = q + row * q_batch_stride + first * q_token_stride + head * q_head_stride
        grad_head = grad + ((row * tokens + first) * heads + head) * head_dim
        offset = (row * heads + head) * tokens + first
        k_sums, v_sums = gather(
            *(k_sums, v_sums, k_tile, v_tile, q_head, grad_head, lse + offset, delta + offset),
            *(start, tl.minimum(diagonal, queries), queries, first_query, scale * 1.4426950408889634),
            *(q_token_stride, heads * head_dim, head_dim, queries_tile, True),
        )
        k_sums, v_sums = gather(
            *(k_sums, v_sums, k_tile, v_tile, q_head, grad_head, lse + offset, delta + offset),
            *(diagonal, queries, queries, first_query, scale * 1.4426950408889634),
            *(q_token_stride, heads * head_dim, head_dim, queries_tile, False),
        )
    line = ((row * tokens_k + token) * kv_heads + kv_head) * head_dim
    store(grad_k + line, kv_heads * head_dim, keys - begin, k_sums * scale, head_dim)
    store(grad_v + line, kv_heads * head_dim, keys - begin, v_sums, head_dim)


@device
def gather(
    k_sums: tl.tensor,
    v_sums: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q: tl.tensor,
    grad: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    queries: tl.tensor,
    first_query: tl.tensor,
    binary: tl.tensor,
    q_stride: tl.tensor,
    grad_stride: tl.tensor,
    head_dim: tl.constexpr,
    queries_tile: tl.constexpr,
    masked: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """dK / scale and dV of a tile of keys from the queries of one head from `start` to `stop`.

    Scores are made transposed, [keys, queries]: the weights, as they leave the registers of one product, are then the
    left side of the next.
    """
    q += tl.cast(start, tl.int64) * q_stride
    grad += tl.cast(start, tl.int64) * grad_stride
    for query in range(start, stop, queries_tile):
        index = query + tl.arange(0, queries_tile)
        q_tile = load(q, q_stride, queries - query, queries_tile, head_dim, k.shape[1], True)
        grad_tile = load(grad, grad_stride, queries - query, queries_tile, head_dim, k.shape[1], True)
        # A weight of a query behind the last is exp2(0 - inf) = 0.
        lse_tile = tl.load(lse + index, mask=index < queries, other=float("inf")) * 1.4426950408889634
        delta_tile = tl.load(delta + index, mask=index < queries, other=0.0)
        scores = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
        grad_weights = tl.dot(v, tl.trans(grad_tile), input_precision="ieee")
        if masked:
            scores = tl.where(first_query[:, None] <= index[None, :], scores, float("-inf"))
        weights = tl.exp2(scores * binary - lse_tile[None, :])
        v_sums = tl.dot(weights.to(grad_tile.dtype), grad_tile, v_sums, input_precision="ieee")
        grad_scores = weights * (grad_weights - delta_tile[None, :])
        k_sums = tl.dot(grad_scores.to(q_tile.dtype), q_tile, k_sums, input_precision="ieee")
        q += queries_tile * q_stride
        grad += queries_tile * grad_stride
    return k_sums, v_sums
