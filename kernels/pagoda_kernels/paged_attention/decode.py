"""paged_attention for decodes (flash decoding), which is bound by reading the cache.

A program takes one KV head of one request and some of its tiles of positions; where a request has several programs,
the one that comes last adds their parts, or, where these are many, a second kernel: see parts.py. What all decodes
share, a prefix in the same blocks, is a part of each that shared_prefix.py computes for all of them at once (Juravsky
et al. 2024, arXiv:2402.05099).

A short request is bound by latency: 512 tokens of a layer of Llama-3.1-8B are read in 0.7 µs by an H100, and attention
takes it 5. So what needs no other kernel's result, the keys and values of earlier steps, is read before this kernel
waits for the one ahead (early_launch.py), which saves 2 µs, and programs are small, to find room beside that one's.

Launch sizes depend on the host's lists alone, and these may be upper bounds: see AttentionBatch.
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
from .call import Call
from .decode_plan import Plan, plan_decodes
from .parts import Parts, add_parts, arrivals, comes_last, leave_part
from .shared_prefix import Prefix, attend_prefix, plan_prefix
from .tile import add_tile, cached_tile, load_queries, nothing_seen

# Parts that a kernel of its own adds at a time: all, in one round trip to memory.
_ADDED_APART = 64


def _longest(batch: AttentionBatch) -> int:
    return max(batch.context_lens_host[: batch.num_decodes])


@dataclass(frozen=True, eq=False)
class Decodes:
    """A call's decodes, for which all is allocated that they need."""

    call: Call
    plan: Plan
    prefix: Prefix
    parts: Parts
    arrivals: Tensor | None


def prepare_decodes(call: Call) -> Decodes:
    """Allocate what launch_decodes needs."""
    batch, num_decodes = call.batch, call.batch.num_decodes
    longest = batch.prepare(_longest)
    if call.window:
        longest = min(longest, call.window)
    prefix = plan_prefix(call)
    plan = plan_decodes(call, longest - prefix.tokens, prefix.parts > 0)
    # Scratch for requests of several parts: first those of the prefix, then the others.
    slots = prefix.parts + plan.splits.most if plan.splits.most > 1 or prefix.parts else 0
    scratch = (num_decodes, call.num_heads, slots)
    parts = Parts(
        torch.empty(*scratch, call.head_size, dtype=torch.float32, device=call.q.device),
        torch.empty(scratch, dtype=torch.float32, device=call.q.device),
    )
    counted = plan.splits.most > 1 and plan.added > 0
    return Decodes(call, plan, prefix, parts, batch.prepare(arrivals, call.num_kv_heads) if counted else None)


def launch_decodes(decodes: Decodes, *, beside_chunks: bool = False) -> None:
    """Write the rows of the output that belong to decodes: request r's is row r.

    beside_chunks: start where attend_chunks has left room, and end after it. Since it was called nothing may have been
    launched, and no memory allocated, which might be what its kernel still reads.
    """
    call, prefix, parts = decodes.call, decodes.prefix, decodes.parts
    batch, tiles, splits = call.batch, decodes.plan.tiles, decodes.plan.splits
    slots = parts.sums.shape[2]
    if prefix.parts:
        attend_prefix(call, prefix, parts)
    early = launches_early(call.q.device)
    launch = {"launch_pdl": True} if early else {}
    span = (
        batch.context_lens,
        batch.shared_prefix if prefix.parts else None,
        call.window,
        splits.most,
        triton.cdiv(splits.tokens, tiles.positions),
    )
    _decode[(call.num_kv_heads, splits.most, batch.num_decodes + beside_chunks)](
        call.q,
        call.k_cache,
        call.v_cache,
        call.out,
        parts.outputs,
        parts.sums,
        decodes.arrivals,
        batch.block_tables,
        *span,
        call.v_scale,
        call.q.stride(0),
        call.q.stride(1),
        batch.block_tables.stride(0),
        call.scale,
        call.softcap,
        slots,
        prefix.parts,
        int(beside_chunks),
        **call.constants(),
        ROWS=tiles.rows,
        POSITIONS=tiles.positions,
        PARTS=slots > 0,
        GROUP_PADDED=triton.next_power_of_2(call.group),
        ADDED=decodes.plan.added,
        AHEAD=decodes.plan.ahead,
        EARLY=early,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **launch,
    )
    if slots and not decodes.plan.added:
        _add_apart[(call.num_heads, batch.num_decodes)](
            parts.outputs,
            parts.sums,
            call.out,
            *span,
            call.v_scale,
            slots,
            prefix.parts,
            NUM_HEADS=call.num_heads,
            HEAD_SIZE=call.head_size,
            HEAD_PADDED=call.head_padded,
            POSITIONS=tiles.positions,
            ADDED=_ADDED_APART,
            WINDOW=call.window != 0,
            EARLY=early,
            num_warps=4,
            **launch,
        )


@triton.jit
def _own_span(contexts_ptr, shared_ptr, request, window, splits, tiles_each, POSITIONS, WINDOW: tl.constexpr):
    """A decode's context, the first position that it reads itself, its tile, and how many programs share the tiles.

    May be called before gdc_wait, as the batch allows: see AttentionBatch.
    """
    context = tl.load(contexts_ptr + request)
    first = 0
    if WINDOW:
        first = tl.maximum(context - window, 0)
    if shared_ptr is not None:
        first = tl.load(shared_ptr)
    first_tile = first // POSITIONS
    used = tl.minimum(tl.cdiv(tl.cdiv(context, POSITIONS) - first_tile, tiles_each), splits)
    return context, first, first_tile, used


@triton.jit(
    do_not_specialize=[
        "window", "splits", "tiles_each", "v_scale", "table_stride", "scale", "softcap", "slots", "prefix_parts",
        "beside_chunks",
    ]
)  # fmt: skip
def _decode(
    q_ptr, k_ptr, v_ptr, out_ptr, parts_ptr, sums_ptr, arrivals_ptr, tables_ptr,
    contexts_ptr, shared_ptr, window, splits, tiles_each, v_scale,
    q_token, q_head, table_stride, scale, softcap, slots, prefix_parts, beside_chunks,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, PARTS: tl.constexpr, GROUP_PADDED: tl.constexpr,
    ADDED: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    # The kernel ahead may be the chunks', which started when the one that decodes need had ended. Nobody waits for it
    # then but a program without a decode: whoever waits for this kernel waits for both.
    must_wait = beside_chunks == 0
    if (beside_chunks != 0) & (request == tl.num_programs(2) - 1):
        if EARLY:  # noqa: SIM102 - one is known to the compiler, the other is not
            if head + split == 0:
                gdc_wait()
        return
    context, first, first_tile, used = _own_span(
        contexts_ptr, shared_ptr, request, window, splits, tiles_each, POSITIONS, WINDOW
    )
    if split >= used:
        return

    # The programs of a request take its tiles in turn: where the first of them lies does not depend on its length.
    begin, step = (first_tile + split) * POSITIONS, used * POSITIONS
    table_ptr = tables_ptr + request * table_stride
    row, dimension = tl.arange(0, ROWS), tl.arange(0, HEAD_PADDED)
    real = (row < GROUP)[:, None] & (dimension < HEAD_SIZE)[None, :]
    total, peak, weight_sum = nothing_seen(ROWS, HEAD_PADDED)
    if AHEAD:
        if EARLY:  # noqa: SIM102 - one is known to the compiler, the other is not
            if must_wait & (begin + POSITIONS >= context):
                gdc_wait()  # for this step's key and value
        k, v = cached_tile(
            k_ptr, v_ptr, table_ptr, begin, first, context, head,
            NUM_KV_HEADS, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, POSITIONS, CHECK=True,
        )  # fmt: skip
    if EARLY:
        if must_wait:
            gdc_wait()
        gdc_launch_dependents()
    q = load_queries(
        q_ptr + request * q_token, row, head, 0, q_head, real, k_ptr.dtype.element_ty.is_fp8(), GROUP, HEAD_PADDED
    )
    if AHEAD:
        position = begin + tl.arange(0, POSITIONS)
        seen = ((position >= first) & (position < context))[None, :]
        total, peak, weight_sum = add_tile(
            total, peak, weight_sum, q, k, v, seen, scale, softcap, MASKED=True, SOFTCAP=SOFTCAP, MAYBE_NOTHING=False
        )
        begin += step
    for start in range(begin, context, step):
        k, v = cached_tile(
            k_ptr, v_ptr, table_ptr, start, first, context, head,
            NUM_KV_HEADS, HEAD_SIZE, HEAD_PADDED, BLOCK_SIZE, POSITIONS, CHECK=True,
        )  # fmt: skip
        position = start + tl.arange(0, POSITIONS)
        live = ((position >= first) & (position < context))[None, :]
        total, peak, weight_sum = add_tile(
            total, peak, weight_sum, q, k, v, live, scale, softcap, MASKED=True, SOFTCAP=SOFTCAP, MAYBE_NOTHING=False
        )
    out = total / weight_sum[:, None]
    first_head = request * (NUM_KV_HEADS * GROUP) + head * GROUP
    if PARTS:  # noqa: SIM102 - one is known to the compiler, the other is not
        if used + prefix_parts > 1:
            leave_part(
                out, peak + tl.log2(weight_sum), parts_ptr, sums_ptr, first_head, prefix_parts + split, slots,
                GROUP, ROWS, HEAD_SIZE, HEAD_PADDED,
            )  # fmt: skip
            if ADDED > 0:
                if arrivals_ptr is not None:  # noqa: SIM102
                    if used > 1:  # noqa: SIM102
                        if not comes_last(arrivals_ptr + request * NUM_KV_HEADS + head, used):
                            return
                add_parts(
                    parts_ptr, sums_ptr, out_ptr, first_head, prefix_parts + used, slots, v_scale,
                    GROUP, GROUP_PADDED, HEAD_SIZE, HEAD_PADDED, ADDED,
                )  # fmt: skip
            return
    place = (first_head + row)[:, None] * HEAD_SIZE + dimension[None, :]
    tl.store(out_ptr + place, (out * v_scale).to(out_ptr.dtype.element_ty), real)


@triton.jit(do_not_specialize=["window", "splits", "tiles_each", "v_scale", "slots", "prefix_parts"])
def _add_apart(
    parts_ptr, sums_ptr, out_ptr, contexts_ptr, shared_ptr, window, splits, tiles_each, v_scale, slots, prefix_parts,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr, POSITIONS: tl.constexpr,
    ADDED: tl.constexpr, WINDOW: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Add the parts of one query head of a request."""
    query_head, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, _, _, used = _own_span(contexts_ptr, shared_ptr, request, window, splits, tiles_each, POSITIONS, WINDOW)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if used + prefix_parts <= 1:
        return  # a single part, which is in its place already, or no decode at all
    add_parts(
        parts_ptr, sums_ptr, out_ptr, request * NUM_HEADS + query_head, prefix_parts + used, slots, v_scale,
        1, 1, HEAD_SIZE, HEAD_PADDED, ADDED,
    )  # fmt: skip
