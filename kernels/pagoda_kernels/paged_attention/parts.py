"""Attention over parts of a request's positions, and how the results become one: each weighted by its softmax's sum.

Whoever adds them, the program that comes last or a kernel of its own, does so in the order of the parts: results do not
depend on which program that is.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch import AttentionBatch


@dataclass(frozen=True, eq=False)
class Parts:
    """Results over parts of the positions, still to be added."""

    outputs: Tensor
    """[B, Hq, parts, D] float32: weighted means of the values."""
    sums: Tensor
    """[B, Hq, parts] float32: the logarithms to base 2 of the sums of their weights."""


def arrivals(batch: AttentionBatch, num_kv_heads: int) -> Tensor:
    """Return a counter for each decode and KV head, zero before and after every launch. The layers of a step share it.

    For `AttentionBatch.prepare`.
    """
    return torch.zeros(batch.num_decodes * num_kv_heads, dtype=torch.int32, device=batch.context_lens.device)


@triton.jit
def leave_part(
    out, sums, parts_ptr, sums_ptr, first_head, slot, slots,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
):  # fmt: skip
    """Store a part of the GROUP query heads from first_head on."""
    row, dimension = tl.arange(0, ROWS), tl.arange(0, HEAD_PADDED)
    part = (first_head + row) * slots + slot
    real = (row < GROUP)[:, None] & (dimension < HEAD_SIZE)[None, :]
    tl.store(parts_ptr + part[:, None] * HEAD_SIZE + dimension[None, :], out, real, cache_modifier=".cg")
    tl.store(sums_ptr + part, sums, row < GROUP, cache_modifier=".cg")
    # All threads' stores come before what follows: an arrival by one thread, which releases them, or loads.
    tl.debug_barrier()


@triton.jit
def comes_last(arrival_ptr, programs):
    """Say whether all others of so many programs were here before, and if so, reset the counter."""
    last = tl.atomic_add(arrival_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(arrival_ptr, 0)
    return last


@triton.jit
def add_parts(
    parts_ptr, sums_ptr, out_ptr, first_head, used, slots, v_scale,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """Write the output of GROUP query heads from the first `used` parts of each, ADDED at a time."""
    row, dimension = tl.arange(0, GROUP_PADDED), tl.arange(0, HEAD_PADDED)
    real = row < GROUP
    total = tl.zeros((GROUP_PADDED, HEAD_PADDED), tl.float32)
    peak = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((GROUP_PADDED,), tl.float32)
    for start in range(0, used, ADDED):
        slot = start + tl.arange(0, ADDED)
        part = (first_head + row)[None, :] * slots + slot[:, None]
        inside = (slot < used)[:, None] & real[None, :]
        sums = tl.load(sums_ptr + part, inside, other=float("-inf"), cache_modifier=".cg")
        within = inside[:, :, None] & (dimension < HEAD_SIZE)[None, None, :]
        places = part[:, :, None] * HEAD_SIZE + dimension[None, None, :]
        outputs = tl.load(parts_ptr + places, within, other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(sums, 0))
        base = tl.where(real, new_peak, 0.0)
        weights = tl.exp2(sums - base[None, :])
        shrink = tl.exp2(peak - base)
        total = total * shrink[:, None] + tl.sum(outputs * weights[:, :, None], 0)
        weight_sum = weight_sum * shrink + tl.sum(weights, 0)
        peak = new_peak
    out = total * (v_scale / tl.where(real, weight_sum, 1.0))[:, None]
    place = (first_head + row)[:, None] * HEAD_SIZE + dimension[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), real[:, None] & (dimension < HEAD_SIZE)[None, :])
