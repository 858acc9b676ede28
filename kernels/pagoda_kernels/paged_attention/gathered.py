"""A contiguous copy of the contexts of a step's prefill chunks.

The Tensor Memory Accelerator of Hopper GPUs reads a tile with one instruction of one thread, but a tile of it is
contiguous, and blocks of the cache are smaller than a tile of keys. Copying costs each position once; the chunk's
queries read it many times.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..early_launch import launches_early
from .batch import AttentionBatch
from .call import Call

# On an H200 a copied position saves more than it costs from about this many queries of each chunk on.
_QUERIES = 256
# What a step may take for copies: as much as 64 Ki tokens of Llama-3.1-8B. Longer contexts are read block by block.
_MOST_BYTES = 2**28
# Positions that a program copies.
_COPIED = 16


@dataclass(frozen=True, eq=False)
class Gathered:
    keys: TensorDescriptor
    """[rows, Hkv * D], in tiles [positions, HEAD_PADDED]; zeros where a context ends within a tile."""
    values: TensorDescriptor
    first_rows: Tensor
    """[chunks] int32: the row of position 0, which lies before the chunk's own rows if a window cuts it off."""
    positions: int
    """Positions of a tile: where a chunk's rows begin is a multiple of it."""


@dataclass(frozen=True, eq=False)
class _Places:
    """Where the chunks' rows lie, the same for all layers of a step that have the same window."""

    rows: int
    longest: int
    """Rows of a chunk, at most."""
    skipped: Tensor
    """[chunks] int32: positions that no query of the chunk sees."""
    counts: Tensor
    """[chunks] int32: rows."""
    first_rows: Tensor


def worth_gathering(call: Call) -> bool:
    """Say whether the device has the accelerator, the chunks have enough queries, and the copies are not too large."""
    batch = call.batch
    if call.q.element_size() != 2 or not launches_early(call.q.device):
        return False
    if min(batch.query_lens_host[batch.num_decodes :]) < _QUERIES:
        return False
    places = batch.prepare(_places, call.window, _positions(call))
    return 2 * places.rows * call.num_kv_heads * call.head_size * call.q.element_size() <= _MOST_BYTES


def _positions(call: Call) -> int:
    return 64 if call.head_padded <= 128 else 32


def gather(call: Call) -> Gathered:
    """Copy what the chunks' queries see, in the queries' dtype."""
    batch, positions = call.batch, _positions(call)
    places = batch.prepare(_places, call.window, positions)
    width = call.num_kv_heads * call.head_size
    keys, values = (torch.empty(places.rows, width, dtype=call.q.dtype, device=call.q.device) for _ in range(2))
    _gather[(triton.cdiv(places.longest, _COPIED), batch.num_requests - batch.num_decodes)](
        call.k_cache,
        call.v_cache,
        keys,
        values,
        batch.block_tables,
        batch.context_lens,
        places.skipped,
        places.counts,
        places.first_rows,
        batch.block_tables.stride(0),
        batch.num_decodes,
        WIDTH=width,
        WIDTH_PADDED=triton.next_power_of_2(width),
        BLOCK_SIZE=call.block_size,
        COPIED=_COPIED,
        num_warps=8,
    )
    shape = [positions, call.head_padded]
    return Gathered(
        TensorDescriptor.from_tensor(keys, shape),
        TensorDescriptor.from_tensor(values, shape),
        places.first_rows,
        positions,
    )


def _places(batch: AttentionBatch, window: int, positions: int) -> _Places:
    first = batch.num_decodes
    contexts = batch.context_lens[first:]
    skipped = torch.zeros_like(contexts)
    if window:
        unseen = contexts - torch.diff(batch.query_starts)[first:] - window + 1
        skipped = unseen.clamp(min=0) // positions * positions
    counts = (contexts - skipped + positions - 1) // positions * positions
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    most = [
        -(-min(c, n + window + positions if window else c) // positions) * positions
        for n, c in zip(batch.query_lens_host[first:], batch.context_lens_host[first:], strict=True)
    ]
    return _Places(sum(most), max(most), skipped, counts, ends - counts - skipped)


@triton.jit(do_not_specialize=["table_stride", "num_decodes"])
def _gather(
    k_ptr, v_ptr, keys_ptr, values_ptr, tables_ptr, contexts_ptr, skipped_ptr, counts_ptr, first_rows_ptr,
    table_stride, num_decodes,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, COPIED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    count = tl.load(counts_ptr + chunk)
    skipped = tl.load(skipped_ptr + chunk)
    first_row = tl.load(first_rows_ptr + chunk)
    request = (chunk + num_decodes).to(tl.int64)
    context = tl.load(contexts_ptr + request)
    if tl.program_id(0) * COPIED >= count:
        return
    position = skipped + tl.program_id(0) * COPIED + tl.arange(0, COPIED)
    column = tl.arange(0, WIDTH_PADDED)[None, :]
    live = position < context
    block = tl.load(tables_ptr + request * table_stride + position // BLOCK_SIZE, live, other=0).to(tl.int64)
    source = (block * BLOCK_SIZE + position % BLOCK_SIZE)[:, None] * WIDTH + column
    target = (first_row + position).to(tl.int64)[:, None] * WIDTH + column
    inside, written = live[:, None] & (column < WIDTH), (position < skipped + count)[:, None] & (column < WIDTH)
    k = tl.load(k_ptr + source, inside, other=0.0)
    v = tl.load(v_ptr + source, inside, other=0.0)
    tl.store(keys_ptr + target, k.to(keys_ptr.dtype.element_ty), written)
    tl.store(values_ptr + target, v.to(values_ptr.dtype.element_ty), written)
