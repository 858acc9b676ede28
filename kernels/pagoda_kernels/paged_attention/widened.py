"""A copy of the contexts of a step's prefill chunks in the queries' dtype, for caches of 8 bits.

Matrix units multiply numbers of one kind. Widening costs each position once; the chunk's queries read it many times.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch import AttentionBatch
from .call import Call

# On an H200 a copied position saves more than it costs from about this many queries of each chunk on.
_QUERIES = 256
# What a step may take for copies: as much as 64 Ki tokens of Llama-3.1-8B. Longer contexts are read as they are.
_MOST_BYTES = 2**28
_BLOCK = 128
# Positions that a program copies.
_COPIED = 16


@dataclass(frozen=True, eq=False)
class _Places:
    """Where the chunks' blocks lie, the same for all layers of a step that have the same window."""

    blocks: int
    longest: int
    """Positions of a chunk, at most."""
    skipped: Tensor
    """[chunks] int32: positions that no query of the chunk sees, whole blocks."""
    counts: Tensor
    """[chunks] int32: positions that are copied, whole blocks."""
    tables: Tensor
    """[chunks, most blocks] int32; what lies before the first copied position is nobody's."""


def worth_widening(call: Call) -> bool:
    """Say whether the chunks have enough queries, and the copies are not too large."""
    batch = call.batch
    if min(batch.query_lens_host[batch.num_decodes :]) < _QUERIES:
        return False
    positions = batch.prepare(_places, call.window).blocks * _BLOCK
    return 2 * positions * call.num_kv_heads * call.head_size * call.q.element_size() <= _MOST_BYTES


def widen(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values [blocks, 128, Hkv, D], zero behind a context, and the chunks' block tables."""
    batch = call.batch
    places = batch.prepare(_places, call.window)
    width = call.num_kv_heads * call.head_size
    shape = (places.blocks, _BLOCK, call.num_kv_heads, call.head_size)
    keys, values = (torch.empty(shape, dtype=call.q.dtype, device=call.q.device) for _ in range(2))
    _widen[(triton.cdiv(places.longest, _COPIED), batch.num_requests - batch.num_decodes)](
        call.k_cache,
        call.v_cache,
        keys,
        values,
        batch.block_tables,
        batch.context_lens,
        places.skipped,
        places.counts,
        places.tables,
        batch.block_tables.stride(0),
        places.tables.stride(0),
        batch.num_decodes,
        WIDTH=width,
        WIDTH_PADDED=triton.next_power_of_2(width),
        BLOCK_SIZE=call.block_size,
        BLOCK=_BLOCK,
        COPIED=_COPIED,
        num_warps=8,
    )
    return keys, values, places.tables


def _places(batch: AttentionBatch, window: int) -> _Places:
    first = batch.num_decodes
    contexts = batch.context_lens[first:]
    skipped = torch.zeros_like(contexts)
    if window:
        unseen = contexts - torch.diff(batch.query_starts)[first:] - window + 1
        skipped = unseen.clamp(min=0) // _BLOCK
    blocks = (contexts + _BLOCK - 1) // _BLOCK - skipped
    before = torch.cumsum(blocks, 0, dtype=torch.int32) - blocks - skipped
    most = [
        -(-(min(c, n + window + _BLOCK) if window else c) // _BLOCK)
        for n, c in zip(batch.query_lens_host[first:], batch.context_lens_host[first:], strict=True)
    ]
    width = -(-max(batch.context_lens_host[first:]) // _BLOCK)
    tables = before[:, None] + torch.arange(width, dtype=torch.int32, device=contexts.device)
    return _Places(sum(most), max(most) * _BLOCK, skipped * _BLOCK, blocks * _BLOCK, tables)


@triton.jit(do_not_specialize=["table_stride", "target_stride", "num_decodes"])
def _widen(
    k_ptr, v_ptr, keys_ptr, values_ptr, tables_ptr, contexts_ptr, skipped_ptr, counts_ptr, targets_ptr,
    table_stride, target_stride, num_decodes,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
    COPIED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    count = tl.load(counts_ptr + chunk)
    skipped = tl.load(skipped_ptr + chunk)
    request = (chunk + num_decodes).to(tl.int64)
    context = tl.load(contexts_ptr + request)
    if tl.program_id(0) * COPIED >= count:
        return
    start = skipped + tl.program_id(0) * COPIED
    position = start + tl.arange(0, COPIED)
    column = tl.arange(0, WIDTH_PADDED)[None, :]
    live = position < context
    block = tl.load(tables_ptr + request * table_stride + position // BLOCK_SIZE, live, other=0).to(tl.int64)
    source = (block * BLOCK_SIZE + position % BLOCK_SIZE)[:, None] * WIDTH + column
    target = tl.load(targets_ptr + chunk * target_stride + start // BLOCK).to(tl.int64)
    target = (target * BLOCK + position % BLOCK)[:, None] * WIDTH + column
    inside, written = live[:, None] & (column < WIDTH), column < WIDTH
    k = tl.load(k_ptr + source, inside, other=0.0)
    v = tl.load(v_ptr + source, inside, other=0.0)
    tl.store(keys_ptr + target, k.to(keys_ptr.dtype.element_ty), written)
    tl.store(values_ptr + target, v.to(values_ptr.dtype.element_ty), written)
