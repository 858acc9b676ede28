"""The part of decode attention that all decodes of a step have in common: a prefix that lies in the same blocks.

Read once for each it would be most of a decode's work. Here the queries of many decodes are rows of one tile, as those
of a prefill chunk are, and a key is read once for all of them (Juravsky et al. 2024, arXiv:2402.05099).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import triton
import triton.language as tl

from .call import Call, Tiles
from .parts import Parts
from .tile import add_tile, cached_tile, load_queries, nothing_seen

# Programs that fill the chip, two for each multiprocessor of an H100 or H200, and the fewest positions of a part.
_PROGRAMS = 264
_PART_TOKENS = 256
_MAX_PARTS = 16


@dataclass(frozen=True)
class Prefix:
    """At most `tokens` positions, cut into `parts` parts; none of either: nothing is shared."""

    tokens: int
    parts: int


def prefix_tiles(call: Call) -> Tiles:
    """As for prefill: see prefill.py."""
    rows = max(128, triton.next_power_of_2(call.group))
    if call.q.element_size() == 4:
        return Tiles(max(32, triton.next_power_of_2(call.group)), 32, 4, 1)
    return Tiles(rows, 64, 4, 2) if call.head_padded <= 128 else Tiles(rows, 32, 8, 2)


def plan_prefix(call: Call) -> Prefix:
    """A window leaves out most of a prefix: then it is not treated apart."""
    tokens = call.batch.shared_prefix_host
    if tokens == 0 or call.window:
        return Prefix(0, 0)
    programs = call.num_kv_heads * triton.cdiv(call.batch.num_decodes * call.group, prefix_tiles(call).rows)
    parts = min(triton.cdiv(_PROGRAMS, programs), triton.cdiv(tokens, _PART_TOKENS), _MAX_PARTS)
    return Prefix(tokens, parts)


def attend_prefix(call: Call, prefix: Prefix, parts: Parts) -> None:
    """Write the first prefix.parts of the parts of every decode and head."""
    batch, tiles = call.batch, prefix_tiles(call)
    queries = tiles.rows // call.group
    grid = (call.num_kv_heads * triton.cdiv(batch.num_decodes, queries), prefix.parts)
    _prefix[grid](
        call.q,
        call.k_cache,
        call.v_cache,
        parts.outputs,
        parts.sums,
        batch.block_tables,
        batch.shared_prefix,
        call.q.stride(0),
        call.q.stride(1),
        call.scale,
        call.softcap,
        batch.num_decodes,
        parts.sums.shape[2],
        prefix.parts,
        **call.constants(),
        ROWS=tiles.rows,
        QUERIES=queries,
        POSITIONS=tiles.positions,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


@triton.jit(do_not_specialize=["scale", "softcap", "num_decodes", "slots", "prefix_parts"])
def _prefix(
    q_ptr, k_ptr, v_ptr, parts_ptr, sums_ptr, table_ptr, shared_ptr,
    q_token, q_head, scale, softcap, num_decodes, slots, prefix_parts,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    head, part = tl.program_id(0) % NUM_KV_HEADS, tl.program_id(1)
    first_decode = (tl.program_id(0) // NUM_KV_HEADS).to(tl.int64) * QUERIES
    shared = tl.load(shared_ptr)
    row, dimension = tl.arange(0, ROWS), tl.arange(0, HEAD_PADDED)
    decode = first_decode + row // GROUP
    is_row = (row < QUERIES * GROUP) & (decode < num_decodes)
    real = is_row[:, None] & (dimension < HEAD_SIZE)[None, :]
    q = load_queries(
        q_ptr + first_decode * q_token,
        row,
        head,
        q_token,
        q_head,
        real,
        k_ptr.dtype.element_ty.is_fp8(),
        GROUP,
        HEAD_PADDED,
    )
    total, peak, weight_sum = nothing_seen(ROWS, HEAD_PADDED)

    each = tl.cdiv(tl.cdiv(shared, POSITIONS), prefix_parts) * POSITIONS
    begin = part * each
    end = tl.minimum(begin + each, shared)
    full_end = begin + tl.maximum(end - begin, 0) // POSITIONS * POSITIONS
    # The table is that of the first decode: in the prefix all are alike.
    for start in range(begin, full_end, POSITIONS):
        k, v = cached_tile(
            k_ptr, v_ptr, table_ptr, start, 0, end, head,
            NUM_KV_HEADS, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, POSITIONS, CHECK=False,
        )  # fmt: skip
        total, peak, weight_sum = add_tile(
            total, peak, weight_sum, q, k, v, None, scale, softcap, MASKED=False, SOFTCAP=SOFTCAP, MAYBE_NOTHING=False
        )
    for start in range(full_end, end, POSITIONS):
        k, v = cached_tile(
            k_ptr, v_ptr, table_ptr, start, 0, end, head,
            NUM_KV_HEADS, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, POSITIONS, CHECK=True,
        )  # fmt: skip
        live = (start + tl.arange(0, POSITIONS) < end)[None, :]
        total, peak, weight_sum = add_tile(
            total, peak, weight_sum, q, k, v, live, scale, softcap, MASKED=True, SOFTCAP=SOFTCAP, MAYBE_NOTHING=False
        )
    # A part without positions has the sum 0, and so no share in what is combined.
    empty = weight_sum == 0
    out = total / tl.where(empty, 1.0, weight_sum)[:, None]
    sums = tl.where(empty, float("-inf"), peak + tl.log2(tl.where(empty, 1.0, weight_sum)))
    at = (decode * (NUM_KV_HEADS * GROUP) + head * GROUP + row % GROUP) * slots + part
    tl.store(parts_ptr + at[:, None] * HEAD_SIZE + dimension[None, :], out, real)
    tl.store(sums_ptr + at, sums, is_row)
