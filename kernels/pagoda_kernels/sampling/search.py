"""The last resort of sample: a program a row searches its thresholds with passes over the whole row."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from ..float_order import order_key
from .rows import SEARCH, draw_in_tile, row_stats, softmax_weights, uniforms


@triton.jit
def _search_key(
    row_ptr,
    target,
    low,
    high,
    largest,
    temperature,
    VOCABULARY: tl.constexpr,
    TILE: tl.constexpr,
    WAYS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """_bisect over the whole row, WAYS - 1 thresholds in a pass, and a last one that does no harm."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    way = tl.arange(0, WAYS)
    while low < high:
        middles = low + (((high - low) * (way + 1).to(tl.int64)) // WAYS)
        middles = tl.minimum(middles, high - 1)
        sums = tl.zeros((TILE, WAYS), tl.float32)
        for start in range(0, VOCABULARY, TILE):
            token = start + tl.arange(0, TILE)
            x = tl.load(row_ptr + token, token < VOCABULARY, other=float("-inf")).to(tl.float32)
            if COUNT:
                weights = tl.where(token < VOCABULARY, 1.0, 0.0)
            else:
                weights = softmax_weights(x, largest, temperature)
            sums += tl.where(order_key(x)[:, None] > middles.to(tl.int32)[None, :], weights[:, None], 0.0)
        below = tl.sum(sums.to(tl.float64), 0) < target
        # The first middle that satisfies is an upper bound, the last that does not a lower one.
        low = tl.maximum(low, tl.max(tl.where(below, low, middles + 1), 0))
        high = tl.minimum(high, tl.min(tl.where(below, middles, high), 0))
    return low.to(tl.int32)


@triton.jit
def _kept_weights(row_ptr, token, threshold, log_min_p, largest, temperature, VOCABULARY: tl.constexpr):
    x = tl.load(row_ptr + token, token < VOCABULARY, other=float("-inf")).to(tl.float32)
    kept = (order_key(x) >= threshold) & ((x - largest) / temperature >= log_min_p)
    return tl.where(kept, softmax_weights(x, largest, temperature), 0.0).to(tl.float64)


@triton.jit
def search_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    state_ptr,
    out_ptr,
    row_stride,
    VOCABULARY: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    WAYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(state_ptr + row) != SEARCH:
        return
    row_ptr = logits_ptr + row * row_stride
    temperature = tl.load(temperature_ptr + row)
    _, largest, tile_weights = row_stats(tile_max_ptr, tile_sum_ptr, row, temperature, NUM_TILES, TILES_PADDED)
    u_tile, u_group, u_token = uniforms(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    mass = tl.sum(tile_weights, 0)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    log_min_p = tl.log(tl.load(min_p_ptr + row))
    highest = order_key(largest)
    threshold = order_key(tl.full((), float("-inf"), tl.float32))
    if (top_k > 0) & (top_k < VOCABULARY):
        threshold = _search_key(
            row_ptr, top_k.to(tl.float64), threshold, highest, largest, temperature, VOCABULARY, TILE, WAYS, True
        )  # fmt: skip
        sums = tl.zeros((TILE,), tl.float64)
        for start in range(0, VOCABULARY, TILE):
            token = start + tl.arange(0, TILE)
            x = tl.load(row_ptr + token, token < VOCABULARY, other=float("-inf")).to(tl.float32)
            sums += tl.where(order_key(x) >= threshold, softmax_weights(x, largest, temperature), 0.0).to(tl.float64)
        mass = tl.sum(sums, 0)
    if top_p < 1:
        # Tokens lighter than this have less than 1 - top_p of the mass even if they are all but one: none is kept.
        lightest = (1 - top_p) * mass.to(tl.float32) / (2 * VOCABULARY)
        threshold = tl.minimum(tl.maximum(threshold, order_key(largest + temperature * tl.log(lightest))), highest)
        threshold = _search_key(
            row_ptr, top_p.to(tl.float64) * mass, threshold, highest, largest, temperature, VOCABULARY, TILE, WAYS,
            False,
        )  # fmt: skip

    # The kept mass first, then the tile at which its share u is exceeded, and that tile again.
    sums = tl.zeros((TILE,), tl.float64)
    for start in range(0, VOCABULARY, TILE):
        token = start + tl.arange(0, TILE)
        sums += _kept_weights(row_ptr, token, threshold, log_min_p, largest, temperature, VOCABULARY)
    target = u_tile * tl.sum(sums, 0)
    before = tl.sum(sums, 0) * 0.0
    first = highest * 0
    start = highest * 0
    while (before <= target) & (start < VOCABULARY):
        token = start + tl.arange(0, TILE)
        weight = tl.sum(_kept_weights(row_ptr, token, threshold, log_min_p, largest, temperature, VOCABULARY), 0)
        first = tl.where(weight > 0, start, first)
        before += weight
        start += TILE
    token = first + tl.arange(0, TILE // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    weights = _kept_weights(row_ptr, token, threshold, log_min_p, largest, temperature, VOCABULARY)
    group, place = draw_in_tile(weights, u_group, u_token, TILE // GROUP, GROUP)
    tl.store(out_ptr + row, tl.minimum(first + group * GROUP + place, VOCABULARY - 1).to(tl.int64))
