"""The first pass of sample: the logits are read once, by many programs a row."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from .rows import softmax_weights


@triton.jit
def tiles_kernel(
    logits_ptr,
    temperature_ptr,
    tile_max_ptr,
    tile_id_ptr,
    tile_sum_ptr,
    tile_min_ptr,
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
    x = tl.load(logits_ptr + row * row_stride + token, token < VOCABULARY, other=float("-inf")).to(tl.float32)
    maxima = tl.max(x, 1)
    largest = tl.max(maxima, 0)
    lowest = tl.min(tl.min(tl.where(x == largest, token, VOCABULARY - 1), 1), 0)
    out = row * NUM_TILES + tile
    tl.store(tile_max_ptr + out, largest)
    tl.store(tile_id_ptr + out, lowest)
    if not GREEDY:
        temperature = tl.load(temperature_ptr + row)
        temperature = tl.where(temperature > 0, temperature, 1.0)
        tl.store(tile_sum_ptr + out, tl.sum(tl.sum(softmax_weights(x, largest, temperature), 1), 0))
    if FILTERED:
        possible = tl.where(x == float("-inf"), largest, x)
        tl.store(tile_min_ptr + out, tl.min(tl.min(possible, 1), 0))
        tl.store(group_max_ptr + row * (NUM_TILES * GROUPS) + group, maxima)


@triton.jit(do_not_specialize=["vocabulary"])
def largest_kernel(tile_max_ptr, tile_id_ptr, out_ptr, vocabulary, NUM_TILES: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, PADDED)
    maxima = tl.load(tile_max_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=float("-inf"))
    ids = tl.load(tile_id_ptr + row * NUM_TILES + tile, tile < NUM_TILES, other=0)
    greedy = tl.min(tl.where((maxima == tl.max(maxima, 0)) & (tile < NUM_TILES), ids, vocabulary - 1), 0)
    tl.store(out_ptr + row, greedy.to(tl.int64))
