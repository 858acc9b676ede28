"""paged_attention for decodes (flash decoding), which is bound by reading the cache.

A program takes one KV head of one request and a part of its positions; where a request has several parts, a second
kernel combines them. What all decodes share, a prefix in the same blocks, is a part of each that shared_prefix.py
computes for all of them at once (Juravsky et al. 2024, arXiv:2402.05099).

Launch sizes depend on the host's lists alone, and these may be upper bounds: to capture decodes in a CUDA graph, make
the batch with the largest context length the graph is to serve in context_lens_host, and the true ones on the device.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..early_launch import launches_early
from .batch import AttentionBatch
from .call import Call, Tiles
from .shared_prefix import Parts, attend_prefix, plan_prefix
from .tile import add_tile, cached_tile, load_queries, nothing_seen

# Programs that fill the chip: a few for each of the 132 multiprocessors of an H100 or H200. With fewer, requests are
# cut into parts, the shortest of _SPLIT_TOKENS; with more, only what is so long that it might end alone.
_PROGRAMS = 512
_SPLIT_TOKENS = 128
_LONG_SPLIT_TOKENS = 2048
_LONG_SPLITS = 8
_MAX_SPLITS = 64
# Parts that are combined at a time: all, in one round trip to memory.
_COMBINED = 64


def decode_tiles(group: int, head_padded: int, itemsize: int, programs: int) -> Tiles:
    """The matrix units want 16 rows at least. A tile of keys is 16 KiB, for programs of any length.

    Where there are so many that a program a multiprocessor at a time is enough, 32 KiB take 2 % less time on an H200.
    """
    size, warps, stages = (16384, 2, 3) if programs < 1024 else (32768, 4, 2)
    positions = max(16, min(128, size // (head_padded * itemsize)))
    return Tiles(max(16, triton.next_power_of_2(group)), positions, warps, stages)


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


def _longest(batch: AttentionBatch) -> int:
    return max(batch.context_lens_host[: batch.num_decodes])


def attend_decodes(call: Call, tiles: Tiles | None = None, splits: Splits | None = None) -> None:
    """Write the rows of the output that belong to decodes: request r's is row r."""
    batch, num_decodes = call.batch, call.batch.num_decodes
    longest = batch.prepare(_longest)
    if call.window:
        longest = min(longest, call.window)
    prefix = plan_prefix(call)
    splits = splits or plan_splits(num_decodes, call.num_kv_heads, longest - prefix.tokens)
    tiles = tiles or decode_tiles(
        call.group, call.head_padded, call.k_cache.element_size(), num_decodes * call.num_kv_heads
    )
    # Scratch for requests of several parts: first those of the prefix, then the others.
    slots = prefix.parts + splits.most if splits.most > 1 or prefix.parts else 0
    scratch = (num_decodes, call.num_heads, slots)
    parts = Parts(
        torch.empty(*scratch, call.head_size, dtype=torch.float32, device=call.q.device),
        torch.empty(scratch, dtype=torch.float32, device=call.q.device),
    )
    if prefix.parts:
        attend_prefix(call, prefix, parts)
    _launch_decode(call, parts, prefix.parts, tiles, splits)


def _launch_decode(call: Call, parts: Parts, prefix_parts: int, tiles: Tiles, splits: Splits) -> None:
    batch, num_slots = call.batch, parts.sums.shape[2]
    early = launches_early(call.q.device)
    launch = {"launch_pdl": True} if early else {}
    span = (
        batch.context_lens,
        batch.shared_prefix if prefix_parts else None,
        call.window,
        splits.most,
        triton.cdiv(splits.tokens, tiles.positions),
        call.v_scale,
    )
    _decode[(call.num_kv_heads, splits.most, batch.num_decodes)](
        call.q,
        call.k_cache,
        call.v_cache,
        call.out,
        parts.outputs,
        parts.sums,
        batch.block_tables,
        *span,
        call.q.stride(0),
        call.q.stride(1),
        batch.block_tables.stride(0),
        call.scale,
        call.softcap,
        num_slots,
        prefix_parts,
        **call.constants(),
        ROWS=tiles.rows,
        POSITIONS=tiles.positions,
        PARTS=num_slots > 0,
        EARLY=early,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **launch,
    )
    if num_slots:
        _combine[(call.num_heads, batch.num_decodes)](
            parts.outputs,
            parts.sums,
            call.out,
            *span,
            num_slots,
            prefix_parts,
            NUM_HEADS=call.num_heads,
            HEAD_SIZE=call.head_size,
            HEAD_PADDED=call.head_padded,
            POSITIONS=tiles.positions,
            COMBINED=_COMBINED,
            WINDOW=call.window != 0,
            EARLY=early,
            num_warps=4,
            **launch,
        )


@triton.jit
def _own_span(context, shared_ptr, window, splits, tiles_each, POSITIONS: tl.constexpr, WINDOW: tl.constexpr):
    """The first position of a decode's own part, its tile, the number of tiles, and how many go to a part.

    A request is cut into parts of equal length, but none shorter than tiles_each tiles.
    """
    first = 0
    if WINDOW:
        first = tl.maximum(context - window, 0)
    if shared_ptr is not None:
        first = tl.load(shared_ptr)
    first_tile = first // POSITIONS
    count = tl.cdiv(context, POSITIONS) - first_tile
    return first, first_tile, count, tl.maximum(tl.cdiv(count, splits), tiles_each)


@triton.jit(
    do_not_specialize=[
        "window", "splits", "tiles_each", "v_scale", "table_stride", "scale", "softcap", "slots", "prefix_parts"
    ]
)  # fmt: skip
def _decode(
    q_ptr, k_ptr, v_ptr, out_ptr, parts_ptr, sums_ptr, tables_ptr,
    contexts_ptr, shared_ptr, window, splits, tiles_each, v_scale,
    q_token, q_head, table_stride, scale, softcap, slots, prefix_parts,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        # In this order: whatever starts after it may take for granted what was complete before this kernel.
        gdc_wait()
        gdc_launch_dependents()
    head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    context = tl.load(contexts_ptr + request)
    first, first_tile, count, each = _own_span(context, shared_ptr, window, splits, tiles_each, POSITIONS, WINDOW)
    if not PARTS:
        each = count
    if split * each >= count:
        return

    row, dimension = tl.arange(0, ROWS), tl.arange(0, HEAD_PADDED)
    real = (row < GROUP)[:, None] & (dimension < HEAD_SIZE)[None, :]
    q = load_queries(q_ptr + request * q_token, row, head, 0, q_head, real, GROUP, HEAD_PADDED)
    total, peak, weight_sum = nothing_seen(ROWS, HEAD_PADDED)
    begin = (first_tile + split * each) * POSITIONS
    end = tl.minimum(begin + each * POSITIONS, context)
    for start in range(begin, end, POSITIONS):
        k, v = cached_tile(
            k_ptr, v_ptr, tables_ptr + request * table_stride, start, first, end, head,
            NUM_KV_HEADS, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, POSITIONS, CHECK=True,
        )  # fmt: skip
        position = start + tl.arange(0, POSITIONS)
        live = ((position >= first) & (position < end))[None, :]
        total, peak, weight_sum = add_tile(
            total, peak, weight_sum, q, k, v, live, scale, softcap, MASKED=True, SOFTCAP=SOFTCAP, MAYBE_NOTHING=False
        )
    out = total / weight_sum[:, None]
    out_row = request * (NUM_KV_HEADS * GROUP) + head * GROUP + row
    if PARTS:  # noqa: SIM102 - one is known to the compiler, the other is not
        if (each < count) | (prefix_parts > 0):
            part = out_row * slots + prefix_parts + split
            tl.store(parts_ptr + part[:, None] * HEAD_SIZE + dimension[None, :], out, real)
            tl.store(sums_ptr + part, peak + tl.log2(weight_sum), row < GROUP)
            return
    out_offset = out_row[:, None] * HEAD_SIZE + dimension[None, :]
    tl.store(out_ptr + out_offset, (out * v_scale).to(out_ptr.dtype.element_ty), real)


@triton.jit(do_not_specialize=["window", "splits", "tiles_each", "v_scale", "slots", "prefix_parts"])
def _combine(
    parts_ptr, sums_ptr, out_ptr,
    contexts_ptr, shared_ptr, window, splits, tiles_each, v_scale, slots, prefix_parts,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr, POSITIONS: tl.constexpr,
    COMBINED: tl.constexpr, WINDOW: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Add the parts of a request's head, each weighted by its share of the softmax's sum."""
    query_head, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # Before the wait: _decode let this kernel start when all before _decode was complete.
    context = tl.load(contexts_ptr + request)
    _, _, count, each = _own_span(context, shared_ptr, window, splits, tiles_each, POSITIONS, WINDOW)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    used = prefix_parts + tl.cdiv(count, each)
    if used == 1:
        return  # a single part, which is in its place already
    dimension = tl.arange(0, HEAD_PADDED)
    out_row = request * NUM_HEADS + query_head
    total = tl.zeros((HEAD_PADDED,), tl.float32)
    peak, weight_sum = float("-inf"), 0.0
    for start in range(0, used, COMBINED):
        slot = start + tl.arange(0, COMBINED)
        part = out_row * slots + slot
        inside = (slot < used)[:, None] & (dimension < HEAD_SIZE)[None, :]
        parts = tl.load(parts_ptr + part[:, None] * HEAD_SIZE + dimension[None, :], inside, other=0.0)
        sums = tl.load(sums_ptr + part, slot < used, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(sums, 0))
        weights = tl.exp2(sums - new_peak)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(parts * weights[:, None], 0)
        weight_sum = weight_sum * shrink + tl.sum(weights, 0)
        peak = new_peak
    out = total * (v_scale / weight_sum)
    tl.store(out_ptr + out_row * HEAD_SIZE + dimension, out.to(out_ptr.dtype.element_ty), dimension < HEAD_SIZE)
