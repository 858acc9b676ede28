"""add_lora in the Triton language: two launches, shrink (x A^T) and expand (times B^T, added to the output).

A tile of rows goes through the distinct adapters of its rows, in ascending order, with the other rows' x set to zero:
chunks of one request cost one turn, a decode batch as many as it has adapters. The inner product over x is split over
programs, or a decode batch would not fill the chip; the expansion adds the parts up in order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of x for a program.
_COLUMNS = 256
# Rows and output columns of a tile: 16 is the least that a matrix unit takes. From so many rows on, larger tiles fill
# the chip too, and read the adapters less often.
_MANY_ROWS = 1024


def add_lora(out: Tensor, x: Tensor, a: Tensor, b: Tensor, adapters: Tensor, scales: Tensor) -> None:
    """See AddLora."""
    rows, inputs = x.shape
    loaded, rank, _ = a.shape
    outputs = out.shape[1]
    if rows == 0 or loaded == 0:
        return
    splits = triton.cdiv(inputs, _COLUMNS)
    tile, columns = (64, 128) if rows >= _MANY_ROWS else (16, 256)
    row_tiles = triton.cdiv(rows, tile)
    rank_padded = max(16, triton.next_power_of_2(rank))
    shrunk = torch.empty(splits, rows, rank_padded, dtype=torch.float32, device=x.device)
    sizes = {"RANK": rank, "RANK_PADDED": rank_padded, "ROWS": tile}
    _shrink[(row_tiles, splits)](
        x, a, adapters, shrunk, rows, loaded, x.stride(0), INPUTS=inputs, COLUMNS=_COLUMNS, **sizes, num_warps=4
    )  # fmt: skip
    _expand[(row_tiles, triton.cdiv(outputs, columns))](
        out,
        b,
        adapters,
        scales,
        shrunk,
        rows,
        loaded,
        out.stride(0),
        OUTPUTS=outputs,
        SPLITS=splits,
        COLUMNS=columns,
        **sizes,
        num_warps=4,
    )


@triton.jit
def _next_adapter(adapters, last, loaded):
    """The lowest adapter of the tile above the last one; `loaded` if there is none."""
    return tl.min(tl.where(adapters > last, adapters, loaded), 0)


@triton.jit(do_not_specialize=["rows", "loaded"])
def _shrink(
    x_ptr,
    a_ptr,
    adapters_ptr,
    shrunk_ptr,
    rows,
    loaded,
    x_stride,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    adapters = tl.load(adapters_ptr + row, row < rows, other=-1)
    index = tl.arange(0, RANK_PADDED)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :]
    x = tl.load(x_ptrs, (adapters >= 0)[:, None] & (column < INPUTS)[None, :], other=0.0)
    total = tl.zeros((ROWS, RANK_PADDED), tl.float32)
    adapter = _next_adapter(adapters, -1, loaded)
    while adapter < loaded:
        a_row = adapter.to(tl.int64) * RANK + index
        a_ptrs = a_ptr + a_row[None, :] * INPUTS + column[:, None]
        a = tl.load(a_ptrs, (index < RANK)[None, :] & (column < INPUTS)[:, None], other=0.0)
        own = tl.where((adapters == adapter)[:, None], x, 0.0).to(x.dtype)
        total = tl.dot(own, a, total, input_precision="ieee")
        adapter = _next_adapter(adapters, adapter, loaded)
    out = (tl.program_id(1).to(tl.int64) * rows + row) * RANK_PADDED
    tl.store(shrunk_ptr + out[:, None] + index[None, :], total, (row < rows)[:, None])


@triton.jit(do_not_specialize=["rows", "loaded"])
def _expand(
    out_ptr,
    b_ptr,
    adapters_ptr,
    scales_ptr,
    shrunk_ptr,
    rows,
    loaded,
    out_stride,
    OUTPUTS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.arange(0, RANK_PADDED)
    adapters = tl.load(adapters_ptr + row, row < rows, other=-1)
    adapter = _next_adapter(adapters, -1, loaded)
    if adapter < loaded:
        out_ptrs = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
        inside = (adapters >= 0)[:, None] & (column < OUTPUTS)[None, :]
        out = tl.load(out_ptrs, inside, other=0.0).to(tl.float32)
        shrunk = tl.zeros((ROWS, RANK_PADDED), tl.float32)
        parts = shrunk_ptr + row.to(tl.int64)[:, None] * RANK_PADDED + index[None, :]
        for part in tl.static_range(SPLITS):  # unrolled: the loads do not wait for each other
            shrunk += tl.load(parts + part * rows * RANK_PADDED, (row < rows)[:, None], other=0.0)
        shrunk *= tl.load(scales_ptr + adapters, adapters >= 0, other=0.0)[:, None]
        # 16-bit matrix units take the shrunk rows as a sum of two numbers: twice the bits of one.
        high = shrunk.to(b_ptr.dtype.element_ty)
        low = (shrunk - high.to(tl.float32)).to(b_ptr.dtype.element_ty)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        while adapter < loaded:
            own = (adapters == adapter)[:, None]
            b_row = adapter.to(tl.int64) * OUTPUTS + column
            b_ptrs = b_ptr + b_row[None, :] * RANK + index[:, None]
            b = tl.load(b_ptrs, (index < RANK)[:, None] & (column < OUTPUTS)[None, :], other=0.0)
            total = tl.dot(tl.where(own, high, 0.0).to(b.dtype), b, total, input_precision="ieee")
            if b_ptr.dtype.element_ty != tl.float32:
                total = tl.dot(tl.where(own, low, 0.0).to(b.dtype), b, total, input_precision="ieee")
            adapter = _next_adapter(adapters, adapter, loaded)
        tl.store(out_ptrs, (out + total).to(out_ptr.dtype.element_ty), inside)
