"""What the kernels of sample share: random numbers, softmax weights, and what is known of a row.

Thresholds are searched over the logits' bit patterns, as integers in the order of the numbers (float_order): an exact
search in a bounded number of steps, also for NaN. "Above a threshold" has one form for counts and for masses: the
smallest key K such that f(tokens with a key > K) < target, where f counts for top_k and adds up weights for top_p.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

# How far a row has come.
SEARCH = tl.constexpr(0)
SETTLED = tl.constexpr(1)
NARROW = tl.constexpr(2)


@triton.jit
def uniforms(seed, position):
    """See philox.uniforms: the numbers for the tile, the group and the token."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(seed, low, high, low * 0, low * 0)
    return _number(word0, word3), _number(word1, word3 >> 10), _number(word2, word3 >> 20)


@triton.jit
def _number(high, low):
    bits = high.to(tl.int64) * 1024 + (low & 1023).to(tl.int64)
    return bits.to(tl.float64) * (1.0 / 4398046511104.0)


@triton.jit
def softmax_weights(x, largest, temperature):
    """Softmax weights relative to the most probable token's; 0 for a forbidden token."""
    return tl.where(x == float("-inf"), 0.0, tl.exp((x - largest) / temperature))


@triton.jit
def row_stats(tile_max_ptr, tile_sum_ptr, row, temperature, NUM_TILES: tl.constexpr, TILES_PADDED: tl.constexpr):
    """The row's maximum, and each tile's sum of weights relative to it, in float64."""
    tile = tl.arange(0, TILES_PADDED)
    maxima = tl.load(tile_max_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=float("-inf"))
    sums = tl.load(tile_sum_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=0.0)
    largest = tl.max(maxima, 0)
    return maxima, largest, (sums * softmax_weights(maxima, largest, temperature)).to(tl.float64)


@triton.jit
def first_above(weights, u, SIZE: tl.constexpr):
    """The first index at which the cumulative float64 weights exceed the share u of their sum.

    Rounding may demand more than there is: then it is the last index with any weight.
    """
    index = tl.arange(0, SIZE)
    first = tl.min(tl.where(tl.cumsum(weights, 0) > u * tl.sum(weights, 0), index, SIZE), 0)
    last = tl.max(tl.where(weights > 0, index, 0), 0)
    return tl.minimum(first, last)


@triton.jit
def draw_in_tile(weights, u_group, u_token, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """The group drawn among float64 weights [GROUPS, GROUP] of a tile, and the place in it of the token drawn there."""
    group = first_above(tl.sum(weights, 1), u_group, GROUPS)
    own = tl.arange(0, GROUPS)[:, None] == group
    return group, first_above(tl.sum(tl.where(own, weights, 0.0), 0), u_token, GROUP)


@triton.jit
def bisect(keys, weights, target, low, high):
    """The smallest K in [low, high] such that the weights of keys > K add up to less than target."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    while low < high:
        middle = (low + high) >> 1
        above = tl.sum(tl.where(keys > middle.to(tl.int32), weights, 0), 0)
        low, high = tl.where(above < target, low, middle + 1), tl.where(above < target, middle, high)
    return low.to(tl.int32)
