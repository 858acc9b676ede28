"""The second pass of sample: a program a row settles nearly all rows among a few hundred groups of logits."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from ..float_order import order_key
from .rows import NARROW, SEARCH, SETTLED, bisect, draw_in_tile, first_above, row_stats, softmax_weights, uniforms


@triton.jit
def pick_kernel(
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
    tile_min_ptr,
    group_max_ptr,
    picked_ptr,
    state_ptr,
    largest_ptr,
    target_ptr,
    found_ptr,
    bracket_ptr,
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
    maxima, largest, tile_weights = row_stats(
        tile_max_ptr, tile_sum_ptr, row, temperature, NUM_TILES, TILES_PADDED
    )  # fmt: skip
    if cold:
        if FILTERED:
            tl.store(state_ptr + row, SETTLED)
        tile = tl.arange(0, TILES_PADDED)
        ids = tl.load(tile_id_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=0)
        greedy = tl.min(tl.where((maxima == largest) & (tile < NUM_TILES), ids, VOCABULARY - 1), 0)
        tl.store(out_ptr + row, greedy.to(tl.int64))
        return
    u_tile, u_group, u_token = uniforms(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    mass = tl.sum(tile_weights, 0)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    plain = temperature > 0
    if FILTERED:
        plain = plain & (top_k <= 0) & (top_p >= 1) & (min_p <= 0)
    if plain:
        if FILTERED:
            tl.store(state_ptr + row, SETTLED)
        first = first_above(tile_weights, u_tile, TILES_PADDED) * TILE
        token = first + tl.arange(0, TILE // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(row_ptr + token, token < VOCABULARY, other=float("-inf")).to(tl.float32)
        weights = softmax_weights(x, largest, temperature).to(tl.float64)
        chosen_group, place = draw_in_tile(weights, u_group, u_token, TILE // GROUP, GROUP)
        chosen = tl.minimum(first + chosen_group * GROUP + place, VOCABULARY - 1)
        tl.store(out_ptr + row, chosen.to(tl.int64))
        return
    if FILTERED:
        # The groups that may hold a token to keep.
        group = tl.arange(0, GROUPS_PADDED)
        group_keys = order_key(
            tl.load(group_max_ptr + row * NUM_GROUPS + group, group < NUM_GROUPS, other=float("-inf"))
        )  # fmt: skip
        highest = tl.max(group_keys, 0)
        lowest = tl.min(group_keys, 0)
        one = tl.full((GROUPS_PADDED,), 1, tl.int32)
        if NUM_GROUPS > PICKED:
            floor = bisect(group_keys, one, PICKED + 1, lowest, highest) + 1
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
        x = tl.load(row_ptr + token, inside & (token < VOCABULARY), other=float("-inf")).to(tl.float32)
        keys = order_key(x)
        candidate = inside & (token < VOCABULARY) & (keys >= floor)
        weights = tl.where(candidate, softmax_weights(x, largest, temperature), 0.0)
        highest = tl.max(keys, 0)

        by_rank = (top_k > 0) & (top_k < VOCABULARY)
        ones = tl.where(candidate, 1, 0)
        known = (by_rank == 0) | (top_k <= tl.sum(ones, 0))
        state = tl.where(known, SETTLED, SEARCH)
        threshold = floor
        if known & by_rank:
            threshold = bisect(keys, ones, top_k, floor, highest)
            mass = tl.sum(tl.where(keys >= threshold, weights, 0.0).to(tl.float64), 0)
        if known & (top_p < 1):
            limit = top_p.to(tl.float64) * mass
            wide = weights.to(tl.float64)
            found = tl.sum(tl.where(keys >= threshold, wide, 0.0), 0)
            if found >= limit:
                threshold = bisect(keys, wide, limit, threshold, highest)
            else:
                # The candidates do not have the mass: the threshold is below them. And it is above this: tokens that
                # are lighter have less than 1 - top_p of the mass, even if they are all but one.
                lightest = 0.99 * (1 - top_p) * mass.to(tl.float32) / VOCABULARY
                tile = tl.arange(0, TILES_PADDED)
                minima = tl.load(tile_min_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=float("inf"))
                bound = tl.maximum(largest + temperature * tl.log(lightest), tl.min(minima, 0))
                lowest = tl.minimum(order_key(bound), floor - 1)
                state = tl.where(min_p > 0, SEARCH, NARROW)
                tl.store(largest_ptr + row, largest)
                tl.store(target_ptr + row, limit)
                tl.store(found_ptr + row, found)
                tl.store(bracket_ptr + row * 2, lowest)
                tl.store(bracket_ptr + row * 2 + 1, floor - 1)
        log_min_p = tl.log(min_p)
        if (NUM_GROUPS > PICKED) & (top_p >= 1) & (by_rank == 0):
            # Only min_p: the candidates must reach below its threshold.
            lightest = tl.min(tl.where(candidate, x, largest), 0)
            state = tl.where((lightest - largest) / temperature < log_min_p, state, SEARCH)
        if state == SETTLED:
            kept = candidate & (keys >= threshold) & ((x - largest) / temperature >= log_min_p)
            kept_weights = tl.reshape(tl.where(kept, weights, 0.0), (PICKED, GROUP)).to(tl.float64)
            # The groups are in order, so the tile at which the cumulative share exceeds u is that of such a group.
            place = tl.arange(0, PICKED)
            tiles = tl.load(picked_ptr + row * PICKED + place, place < num_chosen, other=0) // (TILE // GROUP)
            first = first_above(tl.sum(kept_weights, 1), u_tile, PICKED)
            in_tile = tiles == tl.sum(tl.where(place == first, tiles, 0), 0)
            kept_weights = tl.where(in_tile[:, None], kept_weights, 0.0)
            chosen_group, chosen = draw_in_tile(kept_weights, u_group, u_token, PICKED, GROUP)
            drawn = tl.sum(tl.where(index == chosen_group * GROUP + chosen, token, 0), 0)
            tl.store(out_ptr + row, tl.minimum(drawn, VOCABULARY - 1).to(tl.int64))
        tl.store(state_ptr + row, state)
