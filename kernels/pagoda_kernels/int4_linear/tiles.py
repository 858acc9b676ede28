"""int4_linear of several rows in the Triton language: tiles on the tensor cores.

As in linear's tiles the weight is the tensor cores' 64-row side, and the copy engine streams codes and x into shared
memory. The codes go from there straight into the registers that the tensor cores read, where two at a time become
floats: four bits beside the exponent of 128 (in float16: 1024) are 128 + code, and 128 + zero is taken off, exactly.
That is three instructions for two weights, once for all the rows of a tile. With few rows a group's scale then
multiplies its sums; with many that would cost more than the codes do, and it multiplies the codes, rounded to x's
dtype, as dequantised ones are.
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
from ..linear.tiles import add_splits
from . import PackedInt4Weight


@dataclass(frozen=True)
class Tile:
    """What a program computes: outputs x rows, over this many inputs of each of a block's groups at a time."""

    outputs: int
    rows: int
    inputs: int
    stages: int
    warps: int
    programs: int = 1
    """That a multiprocessor holds."""
    scales_codes: bool = True

    def count(self, out_features: int, rows: int) -> int:
        """Return how many tiles an output of [rows, out_features] has."""
        tiles: int = triton.cdiv(out_features, self.outputs) * triton.cdiv(rows, self.rows)
        return tiles

    def splits(self, tiles: int, steps: int) -> int:
        """Return among how many programs a tile is divided: a power of two, so that all fill the device about once."""
        splits = 1
        while splits < _MOST_SPLITS and 2 * splits * tiles <= self.programs * _MULTIPROCESSORS and 2 * splits <= steps:
            splits *= 2
        return splits


# Of a H200.
_MULTIPROCESSORS = 132
_MOST_SPLITS = 8
# For up to so many rows: a tile, and one for products with enough tiles of its kind for two thirds of the
# multiprocessors. Two warps use the tensor cores' older instructions, which wait for no other warp: best with few rows.
_TILES = {
    8: (Tile(64, 8, 128, 3, warps=2, programs=4, scales_codes=False),) * 2,
    16: (
        Tile(64, 16, 64, 4, warps=2, programs=4, scales_codes=False),
        Tile(64, 16, 128, 2, warps=2, programs=4, scales_codes=False),
    ),
    32: (Tile(128, 32, 64, 3, warps=4, programs=2),) * 2,
    64: (Tile(128, 64, 64, 3, warps=8), Tile(256, 64, 64, 3, warps=8)),
    256: (Tile(256, 64, 64, 3, warps=8), Tile(256, 128, 64, 2, warps=8)),
}
MOST_ROWS = max(_TILES)
ARRIVALS = 4 * _MULTIPROCESSORS
"""Tiles of a product that is split: there are never more."""

# Two codes to two floats less their base: the shifted codes, a power of two's exponent above, times 1. So written, and
# products as sums with -0, they are instructions of Ampere, too.
_TWO_BF16 = tl.constexpr(
    "{ .reg .b32 t, one; shr.u32 t, $1, $4; lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; "
    "mov.b32 one, 0x3F803F80; fma.rn.bf16x2 $0, t, one, $2; }"
)
_TWO_FP16 = tl.constexpr(
    "{ .reg .b32 t, one; shr.u32 t, $1, $4; lop3.b32 t, t, 0x000F000F, 0x64006400, 0xEA; "
    "mov.b32 one, 0x3C003C00; fma.rn.f16x2 $0, t, one, $2; }"
)
_OPERANDS = tl.constexpr("=r,r,r,r,r,r")
"""Two floats; of two elements: the codes in one register, minus the base twice, the shift twice."""
_TIMES_BF16 = tl.constexpr("{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }")
_TIMES_FP16 = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")


def choose_tile(rows: int, out_features: int) -> Tile:
    """Return the tile for a product of 2 to MOST_ROWS rows."""
    few, many = next(tiles for most, tiles in _TILES.items() if rows <= most)
    return many if 3 * many.count(out_features, rows) >= 2 * _MULTIPROCESSORS else few


def tiled_product(x: Tensor, packed: PackedInt4Weight, bias: Tensor | None, tile: Tile) -> Tensor:
    """Return int4_linear(x, packed, bias) for x [T, in] that satisfies linear's `can_tile`."""
    rows, outputs = x.shape[0], packed.out_features
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    tiles = tile.count(outputs, rows)
    steps = packed.data.shape[1] // tile.inputs
    splits = tile.splits(tiles, steps)
    parts = out
    if splits > 1:
        parts = torch.empty(tiles * splits, tile.outputs * tile.rows, dtype=torch.float32, device=x.device)
    early = launches_early(x.device)
    _tiled_product[(tiles * splits,)](
        TensorDescriptor.from_tensor(packed.data, [tile.outputs, tile.inputs]),
        TensorDescriptor.from_tensor(x, [tile.rows, tile.inputs]),
        packed.scales,
        out if bias is None else bias,
        out,
        parts,
        packed.arrivals,
        rows,
        outputs,
        steps,
        triton.cdiv(rows, tile.rows),
        OUTPUTS=tile.outputs,
        ROWS=tile.rows,
        INPUTS=tile.inputs,
        SPLITS=splits,
        STAGES=tile.stages,
        SCALES_CODES=tile.scales_codes,
        BIAS=bias is not None,
        # The interpreter has no assembly, and only 16-bit floats come in twos.
        IN_TWOS=x.is_cuda and x.dtype != torch.float32,
        EARLY=early,
        num_warps=tile.warps,
        **({"launch_pdl": True} if early else {}),
    )
    return out


@triton.jit(do_not_specialize=["rows", "steps", "row_tiles"])
def _tiled_product(
    codes,
    x,
    scales_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    rows,
    outputs,
    steps,
    row_tiles,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALES_CODES: tl.constexpr,
    BIAS: tl.constexpr,
    IN_TWOS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    # Neighbouring programs share the weights (one reads them from memory, the others from the L2 cache).
    program = tl.program_id(0)
    row_tile = program % row_tiles
    split = program // row_tiles % SPLITS
    output_tile = program // row_tiles // SPLITS
    output = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    in_outputs = output < outputs
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for step in tl.range(split * steps // SPLITS, (split + 1) * steps // SPLITS, num_stages=STAGES):
        fours = codes.load([output_tile * OUTPUTS, step * INPUTS])
        block = step // (128 // INPUTS)
        for group in tl.static_range(4):
            # Inputs beyond the last are zeros, and so are the scales of their groups.
            first = block * 512 + group * 128 + step % (128 // INPUTS) * INPUTS
            xs = x.load([row_tile * ROWS, first])
            packed = tl.load(scales_ptr + (block * 4 + group) * outputs + output, in_outputs, other=0)
            scale = (packed & -16).to(tl.float32, bitcast=True)
            weights = _weights(fours, packed & 15, group, out_ptr.dtype.element_ty, IN_TWOS)
            if SCALES_CODES:
                weights = _times(weights, scale, out_ptr.dtype.element_ty, IN_TWOS)
                total = tl.dot(weights, xs.T, total, input_precision="ieee")
            else:
                total += tl.dot(weights, xs.T, input_precision="ieee") * scale[:, None]
        if SCALES_CODES and IN_TWOS:
            # Nothing, but something: the compiler would let the last product run on into the next step, and the
            # assembler, who sees registers of a product change meanwhile, would then make all products wait.
            total = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [total], tl.float32, is_pure=True, pack=1)
    last = True
    if SPLITS > 1:
        total, last = add_splits(
            total, parts_ptr, arrivals_ptr, output_tile * row_tiles + row_tile, split, OUTPUTS, ROWS, SPLITS
        )
    if last:
        row = row_tile * ROWS + tl.arange(0, ROWS)
        if BIAS:
            total += tl.load(bias_ptr + output, in_outputs, other=0.0).to(tl.float32)[:, None]
        out = out_ptr + row.to(tl.int64)[None, :] * outputs + output[:, None]
        tl.store(out, total.to(out_ptr.dtype.element_ty), in_outputs[:, None] & (row < rows)[None, :])


@triton.jit
def _weights(fours, zero, GROUP: tl.constexpr, DTYPE: tl.constexpr, IN_TWOS: tl.constexpr):
    """Return code - zero of one group, [outputs, inputs], for zero [outputs]."""
    IS_BF16: tl.constexpr = tl.bfloat16 == DTYPE
    if IN_TWOS:
        shift = tl.full(fours.shape, 4 * GROUP, tl.int32)
        # Of minus 128 and minus 1024.
        EXPONENTS: tl.constexpr = -0x3CFF3D00 if IS_BF16 else -0x1BFF1C00
        base = tl.broadcast_to((zero * 0x10001 | EXPONENTS)[:, None], fours.shape)
        # The type must be spelled out: the compiler does not take it from a parameter.
        if IS_BF16:
            weights = tl.inline_asm_elementwise(
                _TWO_BF16, _OPERANDS, [fours, base, shift], tl.bfloat16, is_pure=True, pack=2
            )
        else:
            weights = tl.inline_asm_elementwise(
                _TWO_FP16, _OPERANDS, [fours, base, shift], tl.float16, is_pure=True, pack=2
            )
    else:
        weights = (((fours.to(tl.int32) >> (4 * GROUP)) & 15) - zero[:, None]).to(tl.float32).to(DTYPE)
    return weights


@triton.jit
def _times(weights, scale, DTYPE: tl.constexpr, IN_TWOS: tl.constexpr):
    """Return the weights of 16 bits times scale [outputs], float32, rounded twice: the scale, then the product."""
    IS_BF16: tl.constexpr = tl.bfloat16 == DTYPE
    if IN_TWOS:
        scales = tl.broadcast_to(scale.to(DTYPE)[:, None], weights.shape)
        if IS_BF16:
            scaled = tl.inline_asm_elementwise(
                _TIMES_BF16, "=r,r,r", [weights, scales], tl.bfloat16, is_pure=True, pack=2
            )
        else:
            scaled = tl.inline_asm_elementwise(
                _TIMES_FP16, "=r,r,r", [weights, scales], tl.float16, is_pure=True, pack=2
            )
    else:
        scaled = (weights.to(tl.float32) * scale[:, None]).to(DTYPE)
    return scaled
