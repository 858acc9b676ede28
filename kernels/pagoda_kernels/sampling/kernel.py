"""sample in the Triton language: the logits are read once, and the vocabulary is not sorted.

1. `_tiles`, many programs a row: the largest logit of each tile of the vocabulary and its id, the tile's softmax sum
   relative to that, and the largest logit of each group of 32 neighbours.
2. `_pick`, a program a row. Greedy rows and rows without filters need only the tiles (and one of them again, for the
   draw). With filters, let f be the lowest number that at most 256 group maxima reach: all logits from f up lie in
   these groups, which are gathered, and the thresholds of top_k, top_p and min_p are found among their logits by
   bisection. That settles nearly all rows.
3. `_search`, a program a row, for rows that are not settled: more than a few hundred tokens are kept. It searches the
   thresholds with passes over the whole row, and ends at once for settled rows.

Thresholds are searched over the logits' bit patterns, as integers in the order of the numbers: an exact search in a
bounded number of steps, also for NaN. "Above a threshold" has one form for counts and for masses: the smallest key K
such that f(tokens with a key > K) < target, where f counts for top_k and adds up weights for top_p.

Everything runs in a fixed order, so the same (seed, position, logits, parameters) give the same token in any batch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch import SamplingBatch

# Groups of neighbours; 128 bytes each.
_GROUP = 32
# Groups of a tile: 4096 logits, 32 a thread with 4 warps, in 16-byte loads.
_TILE_GROUPS = 128
# Groups that `_pick` looks into.
_PICKED = 256
# Logits that `_search` takes at a time, and thresholds that it tries in a pass.
_SEARCH_TILE = 4096
_SEARCH_WAYS = 8


def sample(logits: Tensor, params: SamplingBatch) -> Tensor:
    """See Sample."""
    requests, vocabulary = logits.shape
    out = torch.empty(requests, dtype=torch.int64, device=logits.device)
    if requests == 0:
        return out
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_tiles = triton.cdiv(vocabulary, _GROUP * _TILE_GROUPS)
    num_groups = num_tiles * _TILE_GROUPS
    tiles_padded = triton.next_power_of_2(num_tiles)
    filtered = params.any_top_k or params.any_top_p or params.any_min_p

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=logits.device)

    tile_max, tile_sum = scratch(requests, num_tiles), scratch(requests, num_tiles)
    tile_id = scratch(requests, num_tiles, dtype=torch.int32)
    group_max = scratch(requests, num_groups) if filtered else tile_max
    _tiles[(requests, num_tiles)](
        logits,
        params.temperature,
        tile_max,
        tile_id,
        tile_sum,
        group_max,
        logits.stride(0),
        VOCABULARY=vocabulary,
        GROUP=_GROUP,
        GROUPS=_TILE_GROUPS,
        NUM_TILES=num_tiles,
        GREEDY=params.all_greedy,
        FILTERED=filtered and not params.all_greedy,
        num_warps=4,
    )
    if params.all_greedy:
        _largest[(requests,)](tile_max, tile_id, out, vocabulary, NUM_TILES=num_tiles, PADDED=tiles_padded, num_warps=1)
        return out
    picked = scratch(requests, _PICKED, dtype=torch.int32) if filtered else tile_id
    settled = scratch(requests, dtype=torch.int32) if filtered else tile_id
    _pick[(requests,)](
        logits,
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.seeds,
        params.positions,
        tile_max,
        tile_id,
        tile_sum,
        group_max,
        picked,
        settled,
        out,
        logits.stride(0),
        VOCABULARY=vocabulary,
        GROUP=_GROUP,
        TILE=_GROUP * _TILE_GROUPS,
        NUM_TILES=num_tiles,
        TILES_PADDED=tiles_padded,
        NUM_GROUPS=num_groups,
        GROUPS_PADDED=triton.next_power_of_2(num_groups),
        PICKED=_PICKED,
        FILTERED=filtered,
        num_warps=8,
    )
    if filtered:
        _search[(requests,)](
            logits,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.seeds,
            params.positions,
            tile_max,
            tile_sum,
            settled,
            out,
            logits.stride(0),
            VOCABULARY=vocabulary,
            TILE=min(_SEARCH_TILE, max(16, triton.next_power_of_2(vocabulary))),
            NUM_TILES=num_tiles,
            TILES_PADDED=tiles_padded,
            WAYS=_SEARCH_WAYS,
            num_warps=16,
        )
    return out


@triton.jit
def _key(x):
    """Integers in the order of the numbers; the sum makes one zero of two."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _uniform(seed, position):
    """See philox.uniform."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    word0, word1, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    bits = (word0 >> 5).to(tl.int64) * 67108864 + (word1 >> 6).to(tl.int64)
    return bits.to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _weights(x, largest, temperature):
    """Softmax weights relative to the most probable token's; 0 for a forbidden token."""
    return tl.where(x == float("-inf"), 0.0, tl.exp((x - largest) / temperature))


@triton.jit
def _row_stats(tile_max_ptr, tile_sum_ptr, row, temperature, NUM_TILES: tl.constexpr, TILES_PADDED: tl.constexpr):
    """The row's maximum, and each tile's sum of weights relative to it, in float64."""
    tile = tl.arange(0, TILES_PADDED)
    maxima = tl.load(tile_max_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=float("-inf"))
    sums = tl.load(tile_sum_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=0.0)
    largest = tl.max(maxima, 0)
    return maxima, largest, (sums * _weights(maxima, largest, temperature)).to(tl.float64)


@triton.jit
def _first_above(weights, target, SIZE: tl.constexpr):
    """The first index at which the cumulative float64 weights exceed target, and the sum before it.

    Rounding may demand more than there is: then it is the last index with any weight.
    """
    index = tl.arange(0, SIZE)
    cumulative = tl.cumsum(weights, 0)
    first = tl.min(tl.where(cumulative > target, index, SIZE), 0)
    last = tl.max(tl.where(weights > 0, index, 0), 0)
    chosen = tl.minimum(first, last)
    return chosen, tl.sum(tl.where(index < chosen, weights, 0.0), 0)


@triton.jit
def _tiles(
    logits_ptr,
    temperature_ptr,
    tile_max_ptr,
    tile_id_ptr,
    tile_sum_ptr,
    group_max_ptr,
    row_stride,
    VOCABULARY: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    GREEDY: tl.constexpr,
    FILTERED: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = tile * GROUPS + tl.arange(0, GROUPS)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits_ptr + row * row_stride + token, token < VOCABULARY, other=float("-inf"))
    maxima = tl.max(x, 1)
    largest = tl.max(maxima, 0)
    lowest = tl.min(tl.min(tl.where(x == largest, token, VOCABULARY - 1), 1), 0)
    out = row * NUM_TILES + tile
    tl.store(tile_max_ptr + out, largest)
    tl.store(tile_id_ptr + out, lowest)
    if not GREEDY:
        temperature = tl.load(temperature_ptr + row)
        temperature = tl.where(temperature > 0, temperature, 1.0)
        tl.store(tile_sum_ptr + out, tl.sum(tl.sum(_weights(x, largest, temperature), 1), 0))
    if FILTERED:
        tl.store(group_max_ptr + row * (NUM_TILES * GROUPS) + group, maxima)


@triton.jit(do_not_specialize=["vocabulary"])
def _largest(tile_max_ptr, tile_id_ptr, out_ptr, vocabulary, NUM_TILES: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, PADDED)
    maxima = tl.load(tile_max_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=float("-inf"))
    ids = tl.load(tile_id_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=0)
    greedy = tl.min(tl.where((maxima == tl.max(maxima, 0)) & (tile < NUM_TILES), ids, vocabulary - 1), 0)
    tl.store(out_ptr + row, greedy.to(tl.int64))


@triton.jit
def _bisect(keys, weights, target, low, high):
    """The smallest K in [low, high] such that the weights of keys > K add up to less than target."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    while low < high:
        middle = (low + high) >> 1
        above = tl.sum(tl.where(keys > middle.to(tl.int32), weights, 0), 0)
        low, high = tl.where(above < target, low, middle + 1), tl.where(above < target, middle, high)
    return low.to(tl.int32)


@triton.jit
def _pick(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    tile_max_ptr,
    tile_id_ptr,
    tile_sum_ptr,
    group_max_ptr,
    picked_ptr,
    settled_ptr,
    out_ptr,
    row_stride,
    VOCABULARY: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    PICKED: tl.constexpr,
    FILTERED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    temperature = tl.load(temperature_ptr + row)
    cold = temperature <= 0
    temperature = tl.where(cold, 1.0, temperature)
    maxima, largest, tile_weights = _row_stats(
        tile_max_ptr, tile_sum_ptr, row, temperature, NUM_TILES, TILES_PADDED
    )  # fmt: skip
    if cold:
        if FILTERED:
            tl.store(settled_ptr + row, 1)
        tile = tl.arange(0, TILES_PADDED)
        ids = tl.load(tile_id_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=0)
        greedy = tl.min(tl.where((maxima == largest) & (tile < NUM_TILES), ids, VOCABULARY - 1), 0)
        tl.store(out_ptr + row, greedy.to(tl.int64))
        return
    u = _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    mass = tl.sum(tile_weights, 0)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    plain = temperature > 0
    if FILTERED:
        plain = plain & (top_k <= 0) & (top_p >= 1) & (min_p <= 0)
    if plain:
        if FILTERED:
            tl.store(settled_ptr + row, 1)
        target = u * mass
        tile_index, before = _first_above(tile_weights, target, TILES_PADDED)
        token = tile_index * TILE + tl.arange(0, TILE)
        x = tl.load(row_ptr + token, token < VOCABULARY, other=float("-inf"))
        weights = _weights(x, largest, temperature).to(tl.float64)
        chosen, _ = _first_above(weights, target - before, TILE)
        chosen = tl.minimum(tile_index * TILE + chosen, VOCABULARY - 1)
        tl.store(out_ptr + row, chosen.to(tl.int64))
        return
    if FILTERED:
        # The groups that may hold a token to keep.
        group = tl.arange(0, GROUPS_PADDED)
        group_keys = _key(
            tl.load(group_max_ptr + row * NUM_GROUPS + group, group < NUM_GROUPS, other=float("-inf"))
        )  # fmt: skip
        highest = tl.max(group_keys, 0)
        lowest = tl.min(group_keys, 0)
        one = tl.full((GROUPS_PADDED,), 1, tl.int32)
        if NUM_GROUPS > PICKED:
            floor = _bisect(group_keys, one, PICKED + 1, lowest, highest) + 1
        else:
            floor = lowest
        chosen_groups = (group_keys >= floor) & (group < NUM_GROUPS)
        rank = tl.cumsum(chosen_groups.to(tl.int32), 0) - 1
        num_chosen = tl.sum(chosen_groups.to(tl.int32), 0)
        tl.store(picked_ptr + row * PICKED + rank, group, chosen_groups & (rank < PICKED))
        tl.debug_barrier()

        index = tl.arange(0, PICKED * GROUP)
        inside = index // GROUP < num_chosen
        token = tl.load(picked_ptr + row * PICKED + index // GROUP, inside, other=0) * GROUP + index % GROUP
        x = tl.load(row_ptr + token, inside & (token < VOCABULARY), other=float("-inf"))
        keys = _key(x)
        candidate = inside & (token < VOCABULARY) & (keys >= floor)
        weights = tl.where(candidate, _weights(x, largest, temperature), 0.0)
        highest = tl.max(keys, 0)

        by_rank = (top_k > 0) & (top_k < VOCABULARY)
        ones = tl.where(candidate, 1, 0)
        known = (by_rank == 0) | (top_k <= tl.sum(ones, 0))
        threshold = floor
        if known & by_rank:
            threshold = _bisect(keys, ones, top_k, floor, highest)
            mass = tl.sum(tl.where(keys >= threshold, weights, 0.0).to(tl.float64), 0)
        if known & (top_p < 1):
            limit = top_p.to(tl.float64) * mass
            wide = weights.to(tl.float64)
            # If the candidates do not have the mass, the threshold is below them.
            known = tl.sum(tl.where(keys >= threshold, wide, 0.0), 0) >= limit
            threshold = _bisect(keys, wide, limit, threshold, highest)
        log_min_p = tl.log(min_p)
        if (NUM_GROUPS > PICKED) & (top_p >= 1) & (by_rank == 0):
            # Only min_p: the candidates must reach below its threshold.
            lightest = tl.min(tl.where(candidate, x, largest), 0)
            known = known & ((lightest - largest) / temperature < log_min_p)
        kept = candidate & (keys >= threshold) & ((x - largest) / temperature >= log_min_p)
        kept_weights = tl.where(kept, weights, 0.0).to(tl.float64)
        chosen, _ = _first_above(kept_weights, u * tl.sum(kept_weights, 0), PICKED * GROUP)
        drawn = tl.sum(tl.where(index == chosen, token, 0), 0)
        tl.store(out_ptr + row, tl.minimum(drawn, VOCABULARY - 1).to(tl.int64), known)
        tl.store(settled_ptr + row, known.to(tl.int32))


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
            x = tl.load(row_ptr + token, token < VOCABULARY, other=float("-inf"))
            if COUNT:
                weights = tl.where(token < VOCABULARY, 1.0, 0.0)
            else:
                weights = _weights(x, largest, temperature)
            sums += tl.where(_key(x)[:, None] > middles.to(tl.int32)[None, :], weights[:, None], 0.0)
        below = tl.sum(sums.to(tl.float64), 0) < target
        # The first middle that satisfies is an upper bound, the last that does not a lower one.
        low = tl.maximum(low, tl.max(tl.where(below, low, middles + 1), 0))
        high = tl.minimum(high, tl.min(tl.where(below, middles, high), 0))
    return low.to(tl.int32)


@triton.jit
def _search(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    settled_ptr,
    out_ptr,
    row_stride,
    VOCABULARY: tl.constexpr,
    TILE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    WAYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(settled_ptr + row) != 0:
        return
    row_ptr = logits_ptr + row * row_stride
    temperature = tl.load(temperature_ptr + row)
    _, largest, tile_weights = _row_stats(tile_max_ptr, tile_sum_ptr, row, temperature, NUM_TILES, TILES_PADDED)
    u = _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    mass = tl.sum(tile_weights, 0)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    log_min_p = tl.log(tl.load(min_p_ptr + row))
    highest = _key(largest)
    threshold = _key(tl.full((), float("-inf"), tl.float32))
    if (top_k > 0) & (top_k < VOCABULARY):
        threshold = _search_key(
            row_ptr, top_k.to(tl.float64), threshold, highest, largest, temperature, VOCABULARY, TILE, WAYS, True
        )  # fmt: skip
        sums = tl.zeros((TILE,), tl.float64)
        for start in range(0, VOCABULARY, TILE):
            token = start + tl.arange(0, TILE)
            x = tl.load(row_ptr + token, token < VOCABULARY, other=float("-inf"))
            sums += tl.where(_key(x) >= threshold, _weights(x, largest, temperature), 0.0).to(tl.float64)
        mass = tl.sum(sums, 0)
    if top_p < 1:
        # Tokens lighter than this have less than 1 - top_p of the mass even if they are all but one: none is kept.
        lightest = (1 - top_p) * mass.to(tl.float32) / (2 * VOCABULARY)
        threshold = tl.minimum(tl.maximum(threshold, _key(largest + temperature * tl.log(lightest))), highest)
        threshold = _search_key(
            row_ptr, top_p.to(tl.float64) * mass, threshold, highest, largest, temperature, VOCABULARY, TILE, WAYS,
            False,
        )  # fmt: skip

    # The kept mass first, then the tile of the vocabulary in which its share u is exceeded.
    sums = tl.zeros((TILE,), tl.float64)
    for start in range(0, VOCABULARY, TILE):
        token = start + tl.arange(0, TILE)
        x = tl.load(row_ptr + token, token < VOCABULARY, other=float("-inf"))
        kept = (_key(x) >= threshold) & ((x - largest) / temperature >= log_min_p)
        sums += tl.where(kept, _weights(x, largest, temperature), 0.0).to(tl.float64)
    target = u * tl.sum(sums, 0)
    before = tl.sum(sums, 0) * 0.0
    drawn = highest * 0 - 1
    last = highest * 0
    start = highest * 0
    while (drawn < 0) & (start < VOCABULARY):
        token = start + tl.arange(0, TILE)
        x = tl.load(row_ptr + token, token < VOCABULARY, other=float("-inf"))
        kept = (_key(x) >= threshold) & ((x - largest) / temperature >= log_min_p)
        weights = tl.where(kept, _weights(x, largest, temperature), 0.0).to(tl.float64)
        cumulative = before + tl.cumsum(weights, 0)
        first = tl.min(tl.where(cumulative > target, token, VOCABULARY), 0)
        last = tl.maximum(last, tl.max(tl.where(weights > 0, token, 0), 0))
        drawn = tl.where(first < VOCABULARY, first, -1)
        before += tl.sum(weights, 0)
        start += TILE
    tl.store(out_ptr + row, tl.where(drawn < 0, last, drawn).to(tl.int64))
