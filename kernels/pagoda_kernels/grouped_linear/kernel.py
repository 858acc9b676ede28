"""grouped_linear in the Triton language: one launch, and the host never learns how many rows an expert has.

The grid has room for the most tiles that M rows of E experts can make: M / BLOCK_M, and one that is partly filled for
each expert. A program finds its expert by counting the tiles before its own; those past the last end at once.

Programs that run together share what they read: eight neighbouring tiles of columns take the same rows, then go on to
the next rows, which mostly are the same expert's.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Rows, columns and depth of a program's tile, its warps, and the tiles of x and weight on their way at once."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


_COLUMN_GROUP = 8


def plan_tiles(rows: int, experts: int) -> Tiles:
    """Return the tiles for `rows` rows of `experts` experts: about as many rows as an expert has on average."""
    each = rows / experts
    if each <= 16:
        return Tiles(16, 64, 128, 4, 4)
    if each <= 48:
        return Tiles(32, 128, 64, 4, 4)
    if each <= 96:
        return Tiles(64, 256, 64, 8, 4)
    return Tiles(128, 256, 64, 8, 4)


def grouped_linear(x: Tensor, weight: Tensor, expert_starts: Tensor) -> Tensor:
    """See GroupedLinear."""
    return launch(x, weight, expert_starts, plan_tiles(x.shape[0], weight.shape[0]))


def launch(x: Tensor, weight: Tensor, expert_starts: Tensor, tiles: Tiles) -> Tensor:
    """Return grouped_linear by tiles of a given size."""
    rows, inputs = x.shape
    experts, outputs, _ = weight.shape
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    row_tiles = triton.cdiv(rows, tiles.rows) + experts
    column_tiles = triton.cdiv(outputs, tiles.columns)
    # float32 tiles need twice the room.
    depth = max(16, min(tiles.depth * 2 // x.dtype.itemsize, triton.next_power_of_2(inputs)))
    _grouped_linear[(row_tiles * triton.cdiv(column_tiles, _COLUMN_GROUP) * _COLUMN_GROUP,)](
        x,
        weight,
        expert_starts,
        out,
        x.stride(0),
        row_tiles,
        EXPERTS=experts,
        EXPERTS_PADDED=triton.next_power_of_2(experts),
        OUTPUTS=outputs,
        INPUTS=inputs,
        COLUMN_TILES=column_tiles,
        COLUMN_GROUP=_COLUMN_GROUP,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        BLOCK_K=depth,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


@triton.jit
def _own_rows(expert_starts_ptr, row_tile, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile of rows (EXPERTS if there is none), the tile's first row, and the end of the expert's."""
    expert = tl.arange(0, EXPERTS_PADDED)
    starts = tl.load(expert_starts_ptr + expert, expert < EXPERTS, other=0)
    ends = tl.load(expert_starts_ptr + expert + 1, expert < EXPERTS, other=0)
    last_tiles = tl.cumsum((ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    own = tl.sum((last_tiles <= row_tile).to(tl.int32), 0)
    before = tl.max(tl.where(last_tiles <= row_tile, last_tiles, 0), 0)
    start = tl.sum(tl.where(expert == own, starts, 0), 0)
    end = tl.sum(tl.where(expert == own, ends, 0), 0)
    return own, start + (row_tile - before) * BLOCK_M, end


@triton.jit(do_not_specialize=["row_tiles"])
def _grouped_linear(
    x_ptr,
    weight_ptr,
    expert_starts_ptr,
    out_ptr,
    x_stride,
    row_tiles,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    COLUMN_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    group = program // (row_tiles * COLUMN_GROUP)
    within = program % (row_tiles * COLUMN_GROUP)
    column_tile = group * COLUMN_GROUP + within % COLUMN_GROUP
    expert, first, end = _own_rows(expert_starts_ptr, within // COLUMN_GROUP, EXPERTS, EXPERTS_PADDED, BLOCK_M)
    if (expert < EXPERTS) & (column_tile < COLUMN_TILES):
        row = first + tl.arange(0, BLOCK_M)
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        depth = tl.arange(0, BLOCK_K)
        # Rows and columns past the end are read again from the first, and not stored: loads without a mask are wide.
        x_row = tl.where(row < end, row, first).to(tl.int64)
        weight_row = expert.to(tl.int64) * OUTPUTS + tl.where(column < OUTPUTS, column, 0)
        x_ptrs = x_ptr + x_row[:, None] * x_stride + depth[None, :]
        weight_ptrs = weight_ptr + weight_row[None, :] * INPUTS + depth[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, INPUTS, BLOCK_K):
            if INPUTS % BLOCK_K == 0:
                x = tl.load(x_ptrs + start)
                weight = tl.load(weight_ptrs + start)
            else:
                x = tl.load(x_ptrs + start, (start + depth < INPUTS)[None, :], other=0.0)
                weight = tl.load(weight_ptrs + start, (start + depth < INPUTS)[:, None], other=0.0)
            total = tl.dot(x, weight, total, input_precision="ieee")
        out_ptrs = out_ptr + row.to(tl.int64)[:, None] * OUTPUTS + column[None, :]
        inside = (row < end)[:, None] & (column < OUTPUTS)[None, :]
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), inside)
