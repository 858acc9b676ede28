"""paged_attention in the Triton language: one kernel for decodes and one for prefill chunks.

Both hold a block of queries in registers and walk over tiles of keys and values, which they find through the block
table, with a running maximum and sum (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691). The
query heads of one KV head are rows of the same block, so that a key is read once for all of them.

**Decode** (flash decoding): bound by reading the cache. A program takes one KV head of one request and a part of its
positions; where a request has several parts, a second kernel combines them.

**Prefill**: bound by arithmetic. A program takes one KV head and as many query tokens of one request as fit its rows.
Programs find their request by bisecting query_starts, and the longest start first.

Launch sizes depend on the host's lists alone, and these may be upper bounds: to capture decodes in a CUDA graph, make
the batch with the largest context length the graph is to serve in context_lens_host, and the true ones on the device.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..early_launch import launches_early
from .batch import AttentionBatch

_LOG2E = 1.4426950408889634

# Decode programs that fill the chip: a few for each of the 132 multiprocessors of an H100 or H200. With fewer, requests
# are cut into parts, the shortest of _SPLIT_TOKENS; with more, only what is so long that it might end alone.
_PROGRAMS = 512
_SPLIT_TOKENS = 128
_LONG_SPLIT_TOKENS = 2048
_LONG_SPLITS = 8
_MAX_SPLITS = 64
# Partial results that are combined at a time.
_COMBINED = 32


@dataclass(frozen=True)
class Tiles:
    """The sizes of a launch: rows of queries, positions of a tile, warps of a program, tiles on their way."""

    rows: int
    positions: int
    warps: int
    stages: int


def decode_tiles(group: int, head_padded: int, itemsize: int, programs: int) -> Tiles:
    """The matrix units want 16 rows at least. A tile of keys is 16 KiB, for programs of any length.

    Where there are so many that a program a multiprocessor at a time is enough, 32 KiB take 2 % less time on an H200.
    """
    size, warps, stages = (16384, 2, 3) if programs < 1024 else (32768, 4, 2)
    positions = max(16, min(128, size // (head_padded * itemsize)))
    return Tiles(max(16, triton.next_power_of_2(group)), positions, warps, stages)


def prefill_tiles(group: int, head_padded: int, itemsize: int) -> Tiles:
    """16-bit operands: 128 rows, for a warpgroup's instruction on each half. float32 has no matrix units: small."""
    if itemsize == 4:
        return Tiles(max(32, triton.next_power_of_2(group)), 32, 4, 1)
    return Tiles(
        max(128, triton.next_power_of_2(group)), 64 if head_padded <= 128 else 32, 4 if head_padded <= 128 else 8, 3
    )


@dataclass(frozen=True)
class Splits:
    """A request is cut into at most `most` parts of at least `tokens` positions."""

    most: int
    tokens: int


def plan_splits(num_requests: int, num_kv_heads: int, max_context: int) -> Splits:
    """Choose from what the host knows; max_context may be an upper bound."""
    programs = num_requests * num_kv_heads
    if programs < _PROGRAMS:
        wanted, tokens = min(triton.cdiv(_PROGRAMS, programs), _MAX_SPLITS), _SPLIT_TOKENS
    else:
        wanted, tokens = _LONG_SPLITS, _LONG_SPLIT_TOKENS
    return Splits(min(triton.cdiv(max_context, tokens), wanted), tokens)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """See PagedAttention. Raises ValueError for a scale that is not positive."""
    if scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if batch.num_decodes > 0:
        _launch_decode(out, q, k_cache, v_cache, batch, scale, sliding_window, softcap)
    if batch.num_requests > batch.num_decodes:
        _launch_prefill(out, q, k_cache, v_cache, batch, scale, sliding_window, softcap)
    return out


def _longest_decode(batch: AttentionBatch) -> int:
    return max(batch.context_lens_host[: batch.num_decodes])


def _launch_decode(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
    tiles: Tiles | None = None,
    splits: Splits | None = None,
) -> None:
    """Write the rows of out that belong to decodes: request r's is row r."""
    _, block_size, num_kv_heads, head_size = k_cache.shape
    num_decodes, num_heads = batch.num_decodes, q.shape[1]
    head_padded = max(16, triton.next_power_of_2(head_size))
    group = num_heads // num_kv_heads
    longest = batch.prepare(_longest_decode)
    splits = splits or plan_splits(num_decodes, num_kv_heads, longest if window is None else min(longest, window))
    most, split, early = splits.most, splits.most > 1, launches_early(q.device)
    tiles = tiles or decode_tiles(group, head_padded, q.element_size(), num_decodes * num_kv_heads)
    # Scratch for the parts of a request that has several: their outputs, and the logarithms of their sums.
    scratch = (num_decodes, num_heads, most) if split else (0,)
    parts = torch.empty(*scratch, head_size, dtype=torch.float32, device=q.device)
    sums = torch.empty(scratch, dtype=torch.float32, device=q.device)
    tiles_each = triton.cdiv(splits.tokens, tiles.positions)
    _decode[(num_kv_heads, most, num_decodes)](
        q,
        k_cache,
        v_cache,
        out,
        parts,
        sums,
        batch.block_tables,
        batch.context_lens,
        q.stride(0),
        q.stride(1),
        batch.block_tables.stride(0),
        scale * _LOG2E,
        0.0 if softcap is None else softcap * _LOG2E,
        window or 0,
        most,
        tiles_each,
        GROUP=group,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        BLOCK_SIZE=block_size,
        ROWS=tiles.rows,
        POSITIONS=tiles.positions,
        SOFTCAP=softcap is not None,
        WINDOW=window is not None,
        SPLIT=split,
        EARLY=early,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if split:
        _combine[(num_heads, num_decodes)](
            parts,
            sums,
            out,
            batch.context_lens,
            window or 0,
            most,
            tiles_each,
            NUM_HEADS=num_heads,
            HEAD_SIZE=head_size,
            HEAD_PADDED=head_padded,
            POSITIONS=tiles.positions,
            COMBINED=_COMBINED,
            WINDOW=window is not None,
            EARLY=early,
            num_warps=4,
            **({"launch_pdl": True} if early else {}),
        )


def _launch_prefill(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
    tiles: Tiles | None = None,
) -> None:
    """Write the rows of out that belong to prefill chunks."""
    _, block_size, num_kv_heads, head_size = k_cache.shape
    head_padded = max(16, triton.next_power_of_2(head_size))
    group = q.shape[1] // num_kv_heads
    tiles = tiles or prefill_tiles(group, head_padded, q.element_size())
    queries = tiles.rows // group
    # Enough for every request's last, partly filled tile; programs without a tile end at once.
    chunks = batch.num_requests - batch.num_decodes
    num_tiles = (q.shape[0] - batch.num_decodes) // queries + chunks
    _prefill[(num_kv_heads * num_tiles,)](
        q,
        k_cache,
        v_cache,
        out,
        batch.block_tables,
        batch.context_lens,
        batch.query_starts,
        q.stride(0),
        q.stride(1),
        batch.block_tables.stride(0),
        scale * _LOG2E,
        0.0 if softcap is None else softcap * _LOG2E,
        window or 0,
        batch.num_decodes,
        batch.num_requests,
        num_tiles,
        GROUP=group,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        BLOCK_SIZE=block_size,
        ROWS=tiles.rows,
        QUERIES=queries,
        POSITIONS=tiles.positions,
        SOFTCAP=softcap is not None,
        WINDOW=window is not None,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


@triton.jit
def _first_tile_and_count(context, window, POSITIONS: tl.constexpr, WINDOW: tl.constexpr):
    """The tiles that a decode sees."""
    first_tile = 0
    if WINDOW:
        first_tile = tl.maximum(context - window, 0) // POSITIONS
    return first_tile, tl.cdiv(context, POSITIONS) - first_tile


@triton.jit
def _tiles_of_a_part(count, splits, tiles_each):
    """A request is cut into parts of equal length, but none shorter than tiles_each tiles."""
    return tl.maximum(tl.cdiv(count, splits), tiles_each)


@triton.jit
def _attend(
    total,
    peak,
    weight_sum,
    q,
    k_ptr,
    v_ptr,
    table_ptr,
    start,
    first,
    last,
    head,
    scale,
    softcap,
    own_first,
    own,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHECK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Add the tile at `start` to the running output, maximum and sum of the rows, all in base 2.

    CHECK: only positions in [first, last) may be read. CAUSAL: row i sees no position beyond own[i], and with WINDOW
    none before own_first[i].
    """
    position = start + tl.arange(0, POSITIONS)
    dimension = tl.arange(0, HEAD_PADDED)
    if CHECK:
        live = (position >= first) & (position < last)
        block = tl.load(table_ptr + position // BLOCK_SIZE, live, other=0)
    else:
        block = tl.load(table_ptr + position // BLOCK_SIZE)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    offset = slot[:, None] * (NUM_KV_HEADS * HEAD_SIZE) + (head * HEAD_SIZE + dimension)[None, :]
    # Slots that must not be read may hold NaN, which no weight of zero would hide.
    if CHECK:
        inside = live[:, None] & (dimension < HEAD_SIZE)[None, :]
        k = tl.load(k_ptr + offset, inside, other=0.0)
        v = tl.load(v_ptr + offset, inside, other=0.0)
    elif HEAD_SIZE < HEAD_PADDED:
        inside = (dimension < HEAD_SIZE)[None, :]
        k = tl.load(k_ptr + offset, inside, other=0.0)
        v = tl.load(v_ptr + offset, inside, other=0.0)
    else:
        k = tl.load(k_ptr + offset)
        v = tl.load(v_ptr + offset)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP:
        # softcap * tanh(x), where both factors of x and the result are in base 2.
        scores = softcap - 2 * softcap / (1 + tl.exp(2 * (scores * scale / softcap)))
        scale = 1.0
    if CAUSAL:
        visible = position[None, :] <= own[:, None]
        if WINDOW:
            visible &= position[None, :] >= own_first[:, None]
        scores = tl.where(visible, scores, float("-inf"))
    elif CHECK:
        scores = tl.where(live[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    base = new_peak
    if WINDOW:
        # A row that has seen nothing yet has no maximum to subtract.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(peak - base)
    weight_sum = weight_sum * shrink + tl.sum(weights, 1)
    total = tl.dot(weights.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
    return total, new_peak, weight_sum


@triton.jit(do_not_specialize=["table_stride", "scale", "softcap", "window", "splits", "tiles_each"])
def _decode(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    parts_ptr,
    sums_ptr,
    tables_ptr,
    contexts_ptr,
    q_token,
    q_head,
    table_stride,
    scale,
    softcap,
    window,
    splits,
    tiles_each,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    if SPLIT and EARLY:
        gdc_launch_dependents()
    head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    context = tl.load(contexts_ptr + request)
    first_tile, count = _first_tile_and_count(context, window, POSITIONS, WINDOW)
    each = _tiles_of_a_part(count, splits, tiles_each) if SPLIT else count
    if split * each >= count:
        return

    row, dimension = tl.arange(0, ROWS), tl.arange(0, HEAD_PADDED)
    real = (row < GROUP)[:, None] & (dimension < HEAD_SIZE)[None, :]
    query_head = head * GROUP + row
    q_offset = request * q_token + query_head.to(tl.int64)[:, None] * q_head + dimension[None, :]
    q = tl.load(q_ptr + q_offset, real, other=0.0)
    total = tl.zeros((ROWS, HEAD_PADDED), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((ROWS,), tl.float32)
    first = tl.maximum(context - window, 0) if WINDOW else 0
    begin = (first_tile + split * each) * POSITIONS
    end = tl.minimum(begin + each * POSITIONS, context)
    for start in range(begin, end, POSITIONS):
        total, peak, weight_sum = _attend(
            total, peak, weight_sum, q, k_ptr, v_ptr, tables_ptr + request * table_stride, start, first, end, head,
            scale, softcap, row, row, NUM_KV_HEADS, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, POSITIONS, SOFTCAP,
            CHECK=True, CAUSAL=False, WINDOW=False,
        )  # fmt: skip
    out = total / weight_sum[:, None]
    out_row = request * (NUM_KV_HEADS * GROUP) + query_head
    if SPLIT:  # noqa: SIM102 - one is known to the compiler, the other is not
        if each < count:
            part = out_row * splits + split
            tl.store(parts_ptr + part[:, None] * HEAD_SIZE + dimension[None, :], out, real)
            tl.store(sums_ptr + part, peak + tl.log2(weight_sum), row < GROUP)
            return
    out_offset = out_row[:, None] * HEAD_SIZE + dimension[None, :]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), real)


@triton.jit(do_not_specialize=["window", "splits", "tiles_each"])
def _combine(
    parts_ptr,
    sums_ptr,
    out_ptr,
    contexts_ptr,
    window,
    splits,
    tiles_each,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    POSITIONS: tl.constexpr,
    COMBINED: tl.constexpr,
    WINDOW: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Add the parts of a request's head, each weighted by its share of the softmax's sum."""
    query_head, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if EARLY:
        gdc_wait()
    context = tl.load(contexts_ptr + request)
    _, count = _first_tile_and_count(context, window, POSITIONS, WINDOW)
    each = _tiles_of_a_part(count, splits, tiles_each)
    if each >= count:
        return  # a single part, which is in its place already
    used = tl.cdiv(count, each)
    dimension = tl.arange(0, HEAD_PADDED)
    out_row = request * NUM_HEADS + query_head
    total = tl.zeros((HEAD_PADDED,), tl.float32)
    peak, weight_sum = float("-inf"), 0.0
    for start in range(0, used, COMBINED):
        split = start + tl.arange(0, COMBINED)
        part = out_row * splits + split
        sums = tl.load(sums_ptr + part, split < used, other=float("-inf"))
        inside = (split < used)[:, None] & (dimension < HEAD_SIZE)[None, :]
        parts = tl.load(parts_ptr + part[:, None] * HEAD_SIZE + dimension[None, :], inside, other=0.0)
        new_peak = tl.maximum(peak, tl.max(sums, 0))
        weights = tl.exp2(sums - new_peak)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(parts * weights[:, None], 0)
        weight_sum = weight_sum * shrink + tl.sum(weights, 0)
        peak = new_peak
    out = total / weight_sum
    tl.store(out_ptr + out_row * HEAD_SIZE + dimension, out.to(out_ptr.dtype.element_ty), dimension < HEAD_SIZE)


@triton.jit(
    do_not_specialize=["table_stride", "scale", "softcap", "window", "num_decodes", "num_requests", "num_tiles"]
)
def _prefill(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tables_ptr,
    contexts_ptr,
    starts_ptr,
    q_token,
    q_head,
    table_stride,
    scale,
    softcap,
    window,
    num_decodes,
    num_requests,
    num_tiles,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    POSITIONS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
):
    head = tl.program_id(0) % NUM_KV_HEADS
    # The last tiles of a chunk see the most: they start first.
    tile = num_tiles - 1 - tl.program_id(0) // NUM_KV_HEADS
    # Request r owns the tiles from (its start - num_decodes) // QUERIES + (r - num_decodes) on; decodes are one token.
    request, beyond = num_decodes, num_requests
    while beyond - request > 1:
        middle = (request + beyond) // 2
        owns = (tl.load(starts_ptr + middle) - num_decodes) // QUERIES + middle - num_decodes <= tile
        request = tl.where(owns, middle, request)
        beyond = tl.where(owns, beyond, middle)
    token = tl.load(starts_ptr + request)
    length = tl.load(starts_ptr + request + 1) - token
    skipped = (tile - (token - num_decodes) // QUERIES - (request - num_decodes)) * QUERIES
    if skipped >= length:
        return

    context = tl.load(contexts_ptr + request)
    row, dimension = tl.arange(0, ROWS), tl.arange(0, HEAD_PADDED)
    query = skipped + row // GROUP
    real = ((row < QUERIES * GROUP) & (query < length))[:, None] & (dimension < HEAD_SIZE)[None, :]
    query_token = (token + query).to(tl.int64)
    query_head = head * GROUP + row % GROUP
    q_offset = query_token[:, None] * q_token + query_head.to(tl.int64)[:, None] * q_head + dimension[None, :]
    q = tl.load(q_ptr + q_offset, real, other=0.0)
    total = tl.zeros((ROWS, HEAD_PADDED), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((ROWS,), tl.float32)

    own = context - length + query
    own_first = own - window + 1
    table_ptr = tables_ptr + request.to(tl.int64) * table_stride
    before = context - length + skipped
    end = tl.minimum(before + QUERIES, context)
    first, begin, unmasked_end = 0, 0, 0
    if WINDOW:
        first = tl.maximum(before - window + 1, 0)
        begin = first // POSITIONS * POSITIONS
        unmasked_end = begin
    else:
        # Every row sees all of these tiles.
        unmasked_end = (before + 1) // POSITIONS * POSITIONS
    for start in range(begin, unmasked_end, POSITIONS):
        total, peak, weight_sum = _attend(
            total, peak, weight_sum, q, k_ptr, v_ptr, table_ptr, start, first, end, head,
            scale, softcap, own_first, own, NUM_KV_HEADS, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, POSITIONS, SOFTCAP,
            CHECK=False, CAUSAL=False, WINDOW=False,
        )  # fmt: skip
    for start in range(unmasked_end, end, POSITIONS):
        total, peak, weight_sum = _attend(
            total, peak, weight_sum, q, k_ptr, v_ptr, table_ptr, start, first, end, head,
            scale, softcap, own_first, own, NUM_KV_HEADS, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, POSITIONS, SOFTCAP,
            CHECK=True, CAUSAL=True, WINDOW=WINDOW,
        )  # fmt: skip
    out = total / weight_sum[:, None]
    out_offset = (query_token[:, None] * (NUM_KV_HEADS * GROUP) + query_head[:, None]) * HEAD_SIZE + dimension[None, :]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), real)
