"""paged_attention for prefill chunks, which is bound by arithmetic.

A program takes one KV head and as many query tokens of one request as fit its rows: the query heads of a KV head are
rows of the same tile, so that a key is read once for all of them. Programs find their request in query_starts, and the
longest of a request start first. Tiles that all rows see in full go without a mask.

On Hopper GPUs there is a faster way: hopper.py.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from . import hopper
from .call import Call, Tiles
from .hopper import attend_on_hopper
from .tile import add_values, cached_tile, load_queries, nothing_seen, weigh
from .widened import widen, worth_widening

# Requests whose starts a program reads at a time.
_SEARCHED = 128


def portable_tiles(group: int, head_padded: int, itemsize: int) -> Tiles:
    """16-bit operands: 128 rows, for a warpgroup's instruction on each half. float32 has no matrix units: small."""
    if itemsize == 4:
        return Tiles(max(32, triton.next_power_of_2(group)), 32, 4, 1)
    rows = max(128, triton.next_power_of_2(group))
    return Tiles(rows, 64, 4, 3) if head_padded <= 128 else Tiles(rows, 32, 8, 3)


def leaves_room(call: Call) -> bool:
    """Say whether attend_chunks can leave multiprocessors to decodes."""
    return hopper.fits(call) and (hopper.reads(call.k_cache, call.q) or worth_widening(call))


def attend_chunks(call: Call, *, beside_decodes: bool = False) -> None:
    """Write the rows of the output that belong to prefill chunks.

    beside_decodes: leave multiprocessors to launch_decodes, which is called next.
    """
    if not leaves_room(call):
        attend_portably(call)
    elif hopper.reads(call.k_cache, call.q):
        tables = call.batch.block_tables[call.batch.num_decodes :]
        attend_on_hopper(call, call.k_cache, call.v_cache, tables, beside_decodes=beside_decodes)
    else:
        attend_on_hopper(call, *widen(call), beside_decodes=beside_decodes)


def attend_portably(call: Call) -> None:
    """The same in the Triton language, for any GPU and any shapes."""
    tiles = portable_tiles(call.group, call.head_padded, call.q.element_size())
    batch, queries = call.batch, tiles.rows // call.group
    # Enough for every request's last, partly filled tile; programs without a tile end at once.
    num_tiles = call.q.shape[0] // queries + batch.num_requests - batch.num_decodes
    _prefill[(call.num_kv_heads * num_tiles,)](
        call.q,
        call.k_cache,
        call.v_cache,
        call.out,
        batch.block_tables,
        batch.context_lens,
        batch.query_starts,
        call.q.stride(0),
        call.q.stride(1),
        batch.block_tables.stride(0),
        call.scale,
        call.softcap,
        call.window,
        call.v_scale,
        batch.num_decodes,
        batch.num_requests,
        num_tiles,
        **call.constants(),
        ROWS=tiles.rows,
        QUERIES=queries,
        POSITIONS=tiles.positions,
        SEARCHED=_SEARCHED,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


@triton.jit
def _find_request(starts_ptr, num_decodes, num_requests, tile, origin, QUERIES: tl.constexpr, SEARCHED: tl.constexpr):
    """The request of a tile: request r's begin at (its start - origin) // QUERIES + (r - num_decodes)."""
    begun = 0
    for first in range(num_decodes, num_requests, SEARCHED):
        request = first + tl.arange(0, SEARCHED)
        known = request < num_requests
        start = tl.load(starts_ptr + request, known, other=0) - origin
        begun += tl.sum((known & (start // QUERIES + request - num_decodes <= tile)).to(tl.int32), 0)
    return num_decodes + begun - 1


@triton.jit
def _walk(
    total, peak, weight_sum, q, k_ptr, v_ptr, table_ptr, begin, stop, first, last, own, window, head, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, POSITIONS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tiles of [begin, stop). MASKED: row i sees no position beyond own[i], nor any before its window."""
    for start in range(begin, stop, POSITIONS):
        k, v = cached_tile(
            k_ptr, v_ptr, table_ptr, start, first, last, head,
            NUM_KV_HEADS, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, POSITIONS, CHECK=MASKED,
        )  # fmt: skip
        visible = None
        if MASKED:
            position = start + tl.arange(0, POSITIONS)
            visible = position[None, :] <= own[:, None]
            if WINDOW:
                visible &= position[None, :] > (own - window)[:, None]
        weights, shrink, peak, weight_sum = weigh(
            peak, weight_sum, q, k, visible, scale, softcap,
            MASKED=MASKED, SOFTCAP=SOFTCAP, MAYBE_NOTHING=MASKED and WINDOW,
        )  # fmt: skip
        total = add_values(total, weights, shrink, v, q.dtype)
    return total, peak, weight_sum


@triton.jit(
    do_not_specialize=[
        "table_stride", "scale", "softcap", "window", "v_scale", "num_decodes", "num_requests", "num_tiles"
    ]
)  # fmt: skip
def _prefill(
    q_ptr, k_ptr, v_ptr, out_ptr, tables_ptr, contexts_ptr, starts_ptr,
    q_token, q_head, table_stride, scale, softcap, window, v_scale, num_decodes, num_requests, num_tiles,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, POSITIONS: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % NUM_KV_HEADS
    # The last tiles of a chunk see the most: they start first.
    tile = num_tiles - 1 - tl.program_id(0) // NUM_KV_HEADS
    origin = tl.load(starts_ptr + num_decodes)  # the first chunk's start
    request = _find_request(starts_ptr, num_decodes, num_requests, tile, origin, QUERIES, SEARCHED)
    token = tl.load(starts_ptr + request)
    length = tl.load(starts_ptr + request + 1) - token
    context = tl.load(contexts_ptr + request)
    skipped = (tile - (token - origin) // QUERIES - (request - num_decodes)) * QUERIES
    if skipped >= length:
        return

    row, dimension = tl.arange(0, ROWS), tl.arange(0, HEAD_PADDED)
    query = skipped + row // GROUP
    real = ((row < QUERIES * GROUP) & (query < length))[:, None] & (dimension < HEAD_SIZE)[None, :]
    first_token = (token + skipped).to(tl.int64)
    eight_bits: tl.constexpr = k_ptr.dtype.element_ty.is_fp8()
    q = load_queries(q_ptr + first_token * q_token, row, head, q_token, q_head, real, eight_bits, GROUP, HEAD_PADDED)
    total, peak, weight_sum = nothing_seen(ROWS, HEAD_PADDED)

    # Of the positions up to end, every row sees [unmasked, masked) in full: whole tiles.
    own = tl.minimum(context - length + query, context - 1)
    before = context - length + skipped
    end = tl.minimum(before + QUERIES, context)
    table_ptr = tables_ptr + request.to(tl.int64) * table_stride
    first, unmasked, masked = 0, 0, (before + 1) // POSITIONS * POSITIONS
    if WINDOW:
        first = tl.maximum(before - window + 1, 0)
        begin = first // POSITIONS * POSITIONS
        masked = tl.maximum(masked, begin)
        unmasked = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), POSITIONS) * POSITIONS, masked)
        total, peak, weight_sum = _walk(
            total, peak, weight_sum, q, k_ptr, v_ptr, table_ptr, begin, unmasked, first, end, own, window, head,
            scale, softcap, NUM_KV_HEADS, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, SOFTCAP, WINDOW, POSITIONS, MASKED=True,
        )  # fmt: skip
    total, peak, weight_sum = _walk(
        total, peak, weight_sum, q, k_ptr, v_ptr, table_ptr, unmasked, masked, first, end, own, window, head,
        scale, softcap, NUM_KV_HEADS, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, SOFTCAP, WINDOW, POSITIONS, MASKED=False,
    )  # fmt: skip
    total, peak, weight_sum = _walk(
        total, peak, weight_sum, q, k_ptr, v_ptr, table_ptr, masked, end, first, end, own, window, head,
        scale, softcap, NUM_KV_HEADS, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, SOFTCAP, WINDOW, POSITIONS, MASKED=True,
    )  # fmt: skip
    out = total * (v_scale / weight_sum)[:, None]
    offset = (row // GROUP * NUM_KV_HEADS + head) * (GROUP * HEAD_SIZE) + row % GROUP * HEAD_SIZE
    out_ptr += first_token * (NUM_KV_HEADS * GROUP * HEAD_SIZE)
    tl.store(out_ptr + offset[:, None] + dimension[None, :], out.to(out_ptr.dtype.element_ty), real)
