"""The matrix product of a few rows with a large weight: tiles on the tensor cores.

out^T = weight x^T: the weight's rows are the tensor cores' 64-row side, and the batch, padded to a power of two, their
narrow one. Hopper's copy engine streams both operands through `stages` buffers in shared memory. What bounds the
product is the weight bytes in flight, so a program takes most of a multiprocessor's shared memory, and the rate at
which one multiprocessor can swallow weights and x together, so where a matrix has few tiles, they can be split along
the inputs: the program that comes last adds the parts, in their order.

From Hopper on, a product starts before the kernel ahead has ended: its first weights are on their way when it waits
for that kernel, which may write x. So all 129 products of Llama-3.1-8B for 16 rows take 5.23 ms on an H100, and 5.33 if
they start in the ordinary way or if their weights wait as well. A prefetch of the next weights into the L2 cache saved
nothing. Nor did programs that share the tiles' inputs evenly among all multiprocessors (stream-K): adding their parts
takes longer than some multiprocessors would be idle.

fp8_linear uses it too, with scales for the rows of x and of the weight.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ..early_launch import launches_early


@dataclass(frozen=True)
class Tile:
    """What a program computes: outputs x rows, over `inputs` at a time."""

    outputs: int
    rows: int
    inputs: int
    stages: int
    warps: int = 4
    splits: int = 1
    """Programs that share a tile, each with a part of the inputs."""

    def count(self, out_features: int, rows: int) -> int:
        """Return how many tiles an output of [rows, out_features] has."""
        tiles: int = triton.cdiv(out_features, self.outputs) * triton.cdiv(rows, self.rows)
        return tiles


@dataclass(frozen=True, eq=False)
class Scales:
    """What the products of 8-bit values are multiplied by."""

    x: Tensor
    """[rows], float32."""
    weight: Tensor
    """[out], float32."""


def can_tile(matrix: Tensor) -> bool:
    """Say whether the copy engine can read the matrix: rows contiguous, 16 bytes aligned."""
    itemsize = matrix.element_size()
    return matrix.stride(1) == 1 and matrix.stride(0) * itemsize % 16 == 0 and matrix.data_ptr() % 16 == 0


def tiled_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tile,
    dtype: torch.dtype,
    scales: Scales | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Return x @ weight.T (times the scales) + bias, [rows, out], contiguous, of a dtype.

    x [rows, in] and weight [out, in] satisfy `can_tile`. On a GPU the weight is read before the kernels ahead on the
    stream have ended: none of those that let others start early may write it. With splits, arrivals int32 holds a zero
    for each tile, and zeros again afterwards: products that may run at the same time must not share it.
    """
    rows, in_features = x.shape
    out_features = weight.shape[0]
    out = torch.empty(rows, out_features, dtype=dtype, device=x.device)
    tiles = tile.count(out_features, rows)
    steps = triton.cdiv(in_features, tile.inputs)
    parts = out
    if tile.splits > 1:
        if arrivals is None or arrivals.numel() < tiles:
            raise ValueError(f"arrivals must hold {tiles} counters for {tile.splits} splits: {arrivals}")
        parts = torch.empty(tiles * tile.splits, tile.outputs * tile.rows, dtype=torch.float32, device=x.device)
    early = launches_early(x.device)
    _product[(tiles * tile.splits,)](
        _descriptor(weight, tile.outputs, tile.inputs),
        _descriptor(x, tile.rows, tile.inputs),
        out if scales is None else scales.x,
        out if scales is None else scales.weight,
        out if bias is None else bias,
        out,
        parts,
        out if arrivals is None else arrivals,
        rows,
        out_features,
        steps,
        triton.cdiv(steps, tile.splits),
        triton.cdiv(rows, tile.rows),
        OUTPUTS=tile.outputs,
        ROWS=tile.rows,
        INPUTS=tile.inputs,
        SPLITS=tile.splits,
        STAGES=tile.stages,
        SCALED=scales is not None,
        BIAS=bias is not None,
        EARLY=early,
        num_warps=tile.warps,
        **({"launch_pdl": True} if early else {}),
    )
    return out


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


@triton.jit(do_not_specialize=["rows", "steps", "steps_each", "row_tiles"])
def _product(
    weight,
    x,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    rows,
    outputs,
    steps,
    steps_each,
    row_tiles,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    # Neighbouring programs share the weights (one reads them from memory, the others from the L2 cache).
    program = tl.program_id(0)
    row_tile = program % row_tiles
    split = program // row_tiles % SPLITS
    output_tile = program // row_tiles // SPLITS
    first = split * steps_each
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for step in tl.range(first, tl.minimum(first + steps_each, steps), num_stages=STAGES):
        weights = weight.load([output_tile * OUTPUTS, step * INPUTS])
        if EARLY:
            step = after_the_kernel_ahead(step)
        xs = x.load([row_tile * ROWS, step * INPUTS])
        total = tl.dot(weights, xs.T, total)
    if EARLY:
        gdc_wait()  # A split may have had no step to wait in.
    last = True
    if SPLITS > 1:
        total, last = add_splits(
            total, parts_ptr, arrivals_ptr, output_tile * row_tiles + row_tile, split, OUTPUTS, ROWS, SPLITS
        )
    if last:
        output = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
        row = row_tile * ROWS + tl.arange(0, ROWS)[None, :]
        if SCALED:
            total *= tl.load(weight_scale_ptr + output, output < outputs, other=0.0)
            total *= tl.load(x_scale_ptr + row, row < rows, other=0.0)
        if BIAS:
            total += tl.load(bias_ptr + output, output < outputs, other=0.0).to(tl.float32)
        inside = (output < outputs) & (row < rows)
        tl.store(out_ptr + row.to(tl.int64) * outputs + output, total.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def after_the_kernel_ahead(step):
    """Return step when the kernel ahead has ended: at once, but for the first time.

    The compiler overlaps the loads of several steps; gdc_wait among them would stand in its way, and before them it
    would delay the first weights. So this is a calculation in its eyes, and what depends on its result comes after.
    """
    return tl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, $1;", "=r,r", [step], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def add_splits(
    total,
    parts_ptr,
    arrivals_ptr,
    tile,
    split,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Leave this split's part of a tile; return the sum and True to the program that comes last, False to others."""
    place = tl.arange(0, OUTPUTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    parts = parts_ptr + tile.to(tl.int64) * (SPLITS * OUTPUTS * ROWS) + place
    tl.store(parts + split * (OUTPUTS * ROWS), total, cache_modifier=".cg")
    # All threads' stores come before the one thread's arrival, which releases them.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        tl.store(arrivals_ptr + tile, 0)
        total = tl.zeros((OUTPUTS, ROWS), tl.float32)
        for part in tl.static_range(SPLITS):
            total += tl.load(parts + part * (OUTPUTS * ROWS), cache_modifier=".cg")
    return total, last
