"""sample's way for a top_p that keeps thousands of tokens: many programs a row find its threshold in two passes.

What is left when `pick` gives a row up is a bracket of keys, from the highest key that the candidates do not reach down
to the lightest weight that top_p may keep.

1. `count_kernel` counts the row's logits in even bins of the bracket.
2. `locate_kernel`, a program a row: with the weights of the bins' middles, the counts give the place at which the
   target is reached, nearly always to within half a bin. The logits around it are the new bracket.
3. `collect_kernel`: each tile adds up the weights above the bracket, and writes its logits within it, a few hundred in
   a row, to the row's slots.
4. `finish_kernel`, a program a row: the threshold among these by bisection, then the tile that the draw falls into, and
   the group and the token in it.

Only 3 and 4 decide, and by weights, not by counts: where the bins misled, or the slots are too few because that many
logits are almost equal, the row goes on to `search`.

Logits take their slots in any order (a running count over a tile would cost more than all the rest of `collect`), so
their weights are added up as integers, to which the order is all the same. The other sums have one order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from ..float_order import from_order_key, order_key
from .rows import NARROW, SEARCH, bisect, draw_in_tile, softmax_weights, uniforms

# A weight of 1 as an integer: 2^13 of them are far from the end of 64 bits, and 2^-40 is far below float32's rounding.
_UNIT = tl.constexpr(1099511627776.0)


@triton.jit
def _edges(bracket_ptr, BINS: tl.constexpr):
    """The bracket's keys, its low number, and the width of its bins: 1 to BINS - 2. Bin 0 is for what lies outside."""
    low, high = tl.load(bracket_ptr), tl.load(bracket_ptr + 1)
    bottom = from_order_key(low)
    return low, high, bottom, (from_order_key(high) - bottom) / (BINS - 2)


@triton.jit
def count_kernel(
    logits_ptr,
    state_ptr,
    bracket_ptr,
    counts_ptr,
    row_stride,
    VOCABULARY: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    BINS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(state_ptr + row) != NARROW:
        return
    _, high, bottom, width = _edges(bracket_ptr + row * 2, BINS)
    top = from_order_key(high)
    counts = tl.zeros((BINS,), tl.int32)
    for tile in range(segment * SEGMENT, min((segment + 1) * SEGMENT, NUM_TILES)):
        token = tile * TILE + tl.arange(0, TILE)
        x = tl.load(logits_ptr + row * row_stride + token, token < VOCABULARY, other=float("-inf")).to(tl.float32)
        inside = (x >= bottom) & (x <= top)
        place = 1 + (tl.where(inside, x - bottom, 0.0) * (1 / width)).to(tl.int32)
        place = tl.minimum(tl.maximum(place, 1), BINS - 2)
        counts += tl.histogram(tl.where(inside, place, 0), BINS)
    tl.store(counts_ptr + (row * SEGMENTS + segment) * BINS + tl.arange(0, BINS), counts)


@triton.jit
def locate_kernel(
    temperature_ptr,
    state_ptr,
    largest_ptr,
    target_ptr,
    found_ptr,
    bracket_ptr,
    counts_ptr,
    next_bracket_ptr,
    filled_ptr,
    BINS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENTS_PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(state_ptr + row) != NARROW:
        return
    low, high, bottom, width = _edges(bracket_ptr + row * 2, BINS)
    place = tl.arange(0, BINS)
    segment = tl.arange(0, SEGMENTS_PADDED)[:, None]
    parts = tl.load(counts_ptr + (row * SEGMENTS + segment) * BINS + place[None, :], segment < SEGMENTS, other=0)
    counts = tl.sum(parts, 0)
    middles = softmax_weights(
        bottom + (place - 0.5) * width, tl.load(largest_ptr + row), tl.load(temperature_ptr + row)
    )  # fmt: skip
    weights = tl.where((place > 0) & (place < BINS - 1), counts.to(tl.float32) * middles, 0.0)
    weights = weights.to(tl.float64)
    from_here_up = tl.load(found_ptr + row) + tl.sum(weights, 0) - tl.cumsum(weights, 0) + weights
    target = tl.load(target_ptr + row)
    reached = tl.max(tl.where((from_here_up >= target) & (place < BINS - 1), place, 1), 0)

    # The way down from the bin's upper end, by the share of its weight that is needed. What that misses by shrinks with
    # the number of logits in the bin.
    own = place == reached
    weight = tl.sum(tl.where(own, weights, 0.0), 0)
    missing = target - tl.sum(tl.where(own, from_here_up - weights, 0.0), 0)
    share = tl.where(weight > 0, missing / weight, 1.0).to(tl.float32)
    centre = bottom + (reached - tl.minimum(tl.maximum(share, 0.0), 1.0)) * width
    reach = (0.6 + 2 * tl.rsqrt(1.0 + tl.sum(tl.where(own, counts, 0), 0).to(tl.float32))) * width
    narrow_low = tl.minimum(tl.maximum(order_key(centre - reach), low), high)
    narrow_high = tl.minimum(tl.maximum(order_key(centre + reach), narrow_low), high)
    tl.store(next_bracket_ptr + row * 2, narrow_low)
    tl.store(next_bracket_ptr + row * 2 + 1, narrow_high)
    tl.store(filled_ptr + row, 0)


@triton.jit
def collect_kernel(
    logits_ptr,
    temperature_ptr,
    state_ptr,
    largest_ptr,
    bracket_ptr,
    above_ptr,
    candidates_ptr,
    owners_ptr,
    filled_ptr,
    row_stride,
    VOCABULARY: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    SEGMENT: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(state_ptr + row) != NARROW:
        return
    largest, temperature = tl.load(largest_ptr + row), tl.load(temperature_ptr + row)
    bottom, top = from_order_key(tl.load(bracket_ptr + row * 2)), from_order_key(tl.load(bracket_ptr + row * 2 + 1))
    for tile in range(segment * SEGMENT, min((segment + 1) * SEGMENT, NUM_TILES)):
        token = tile * TILE + tl.arange(0, TILE)
        x = tl.load(logits_ptr + row * row_stride + token, token < VOCABULARY, other=float("-inf")).to(tl.float32)
        heavy = tl.where(x > top, tl.exp((x - largest) * (1 / temperature)), 0.0)
        tl.store(above_ptr + row * NUM_TILES + tile, tl.sum(heavy, 0))
        candidate = (x >= bottom) & (x <= top) & (token < VOCABULARY)
        slot = tl.atomic_add(filled_ptr + row + token * 0, 1, candidate, sem="relaxed")
        free = candidate & (slot < SLOTS)
        tl.store(candidates_ptr + row * SLOTS + slot, x, free)
        tl.store(owners_ptr + row * SLOTS + slot, tile + token * 0, free)


@triton.jit
def _mass_up_to(last, above, owners, weights, TILES_PADDED: tl.constexpr):
    """The weight of the tiles up to and including the last: what is above the bracket, and kept candidates."""
    heavy = tl.sum(tl.where(tl.arange(0, TILES_PADDED) <= last, above, 0.0), 0)
    return heavy + tl.sum(tl.where(owners <= last, weights, 0), 0).to(tl.float64) / _UNIT


@triton.jit
def _first_tile(above, owners, weights, share, NUM_TILES: tl.constexpr, TILES_PADDED: tl.constexpr):
    """The first tile up to which the weight exceeds the share."""
    low, high = tl.full((), 0, tl.int32), tl.full((), NUM_TILES - 1, tl.int32)
    while low < high:
        middle = (low + high) // 2
        enough = _mass_up_to(middle, above, owners, weights, TILES_PADDED) > share
        low, high = tl.where(enough, low, middle + 1), tl.where(enough, middle, high)
    return low


@triton.jit
def finish_kernel(
    logits_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    state_ptr,
    largest_ptr,
    target_ptr,
    first_bracket_ptr,
    bracket_ptr,
    above_ptr,
    candidates_ptr,
    owners_ptr,
    filled_ptr,
    out_ptr,
    row_stride,
    VOCABULARY: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(state_ptr + row) != NARROW:
        return
    filled = tl.load(filled_ptr + row)
    tile = tl.arange(0, TILES_PADDED)
    above = tl.load(above_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=0.0).to(tl.float64)
    slot = tl.arange(0, SLOTS)
    x = tl.load(candidates_ptr + row * SLOTS + slot, slot < filled, other=float("-inf"))
    owners = tl.load(owners_ptr + row * SLOTS + slot, slot < filled, other=0)
    largest, temperature = tl.load(largest_ptr + row), tl.load(temperature_ptr + row)
    weights = (softmax_weights(x, largest, temperature).to(tl.float64) * _UNIT).to(tl.int64)
    keys = order_key(x)

    low, high = tl.load(bracket_ptr + row * 2), tl.load(bracket_ptr + row * 2 + 1)
    target = (tl.load(target_ptr + row) - tl.sum(above, 0)) * _UNIT
    reached = (tl.sum(weights, 0) >= target) | (low == tl.load(first_bracket_ptr + row * 2))
    if (target <= 0) | (reached == 0) | (filled > SLOTS):
        tl.store(state_ptr + row, SEARCH)
        return
    threshold = bisect(keys, weights, target, low, high)

    weights = tl.where(keys >= threshold, weights, 0)
    total = tl.sum(above, 0) + tl.sum(weights, 0).to(tl.float64) / _UNIT
    u_tile, u_group, u_token = uniforms(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    share = tl.minimum(u_tile * total, total * (1 - 2.220446049250313e-16))  # below it also where it was rounded up
    first = _first_tile(above, owners, weights, share, NUM_TILES, TILES_PADDED) * TILE
    token = first + tl.arange(0, TILE // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits_ptr + row * row_stride + token, token < VOCABULARY, other=float("-inf")).to(tl.float32)
    kept_weights = tl.where(order_key(x) >= threshold, softmax_weights(x, largest, temperature), 0.0).to(tl.float64)
    group, place = draw_in_tile(kept_weights, u_group, u_token, TILE // GROUP, GROUP)
    tl.store(out_ptr + row, tl.minimum(first + group * GROUP + place, VOCABULARY - 1).to(tl.int64))
