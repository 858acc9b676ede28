"""int4_linear of several rows in the Triton language: tiles on the tensor cores.

As in linear's tiles the weight is the tensor cores' 64-row side. Its words go from shared memory straight into the
registers that the tensor cores read, where two codes at a time become floats: four bits beside the exponent of 128 (in
float16: 1024) are 128 + code, and 128 + zero is taken off, exactly.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linear.tiles import add_splits
from . import PackedInt4Weight


@dataclass(frozen=True)
class Tile:
    """What a program computes: outputs x rows, over this many words of each output at a time."""

    outputs: int
    rows: int
    words: int
    stages: int
    warps: int = 4


# Two programs share a multiprocessor of an H200, up to 113 KiB each.
_TILES = (Tile(64, 16, 64, stages=3), Tile(64, 64, 16, stages=4))
_PROGRAMS = 2 * 132
_MOST_SPLITS = 8
ARRIVALS = _PROGRAMS
"""Tiles of a product that is split: there are never more."""

# Two codes to two floats less their base: the four bits of both words side by side, a power of two's exponent above.
_TWO_BF16 = tl.constexpr(
    "{ .reg .b32 t; prmt.b32 t, $1, $2, $4; shr.u32 t, t, $6; "
    "lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; sub.rn.bf16x2 $0, t, $3; }"
)
_TWO_FP16 = tl.constexpr(
    "{ .reg .b32 t; prmt.b32 t, $1, $2, $4; shr.u32 t, t, $6; "
    "lop3.b32 t, t, 0x000F000F, 0x64006400, 0xEA; sub.rn.f16x2 $0, t, $3; }"
)
_OPERANDS = tl.constexpr("=r,r,r,r,r,r,r,r")
"""Two floats; of two words: the words, the bases, which half of them, and the shift."""


def tiled_product(x: Tensor, packed: PackedInt4Weight, bias: Tensor | None) -> Tensor:
    """Return int4_linear(x, packed, bias) for x [T, in]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, outputs = x.shape[0], packed.out_features
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    tile = next((tile for tile in _TILES if rows <= tile.rows), _TILES[-1])
    tiles = triton.cdiv(outputs, tile.outputs) * triton.cdiv(rows, tile.rows)
    steps = packed.data.shape[1] // tile.words
    splits = _splits(tiles, steps)
    parts = out
    if splits > 1:
        parts = torch.empty(tiles * splits, tile.outputs * tile.rows, dtype=torch.float32, device=x.device)
    _tiled_product[(tiles * splits,)](
        x,
        packed.data,
        packed.scales,
        out if bias is None else bias,
        out,
        parts,
        packed.arrivals,
        x.stride(0),
        rows,
        outputs,
        packed.in_features,
        steps,
        triton.cdiv(rows, tile.rows),
        OUTPUTS=tile.outputs,
        ROWS=tile.rows,
        WORDS=tile.words,
        SPLITS=splits,
        STAGES=tile.stages,
        BIAS=bias is not None,
        # The interpreter has no assembly, and only 16-bit floats come in twos.
        IN_TWOS=x.is_cuda and x.dtype != torch.float32,
        num_warps=tile.warps,
    )
    return out


def _splits(tiles: int, steps: int) -> int:
    """Return among how many programs a tile is divided: a power of two, so that all fill the device about once."""
    splits = 1
    while splits < _MOST_SPLITS and 2 * splits * tiles <= _PROGRAMS and 4 * splits <= steps:
        splits *= 2
    return splits


@triton.jit(do_not_specialize=["rows", "steps", "row_tiles"])
def _tiled_product(
    x_ptr,
    words_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrivals_ptr,
    x_stride,
    rows,
    outputs,
    inputs,
    steps,
    row_tiles,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    IN_TWOS: tl.constexpr,
):
    program = tl.program_id(0)
    row_tile = program % row_tiles
    split = program // row_tiles % SPLITS
    output_tile = program // row_tiles // SPLITS
    output = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, WORDS)
    word_ptr = words_ptr + output.to(tl.int64)[:, None] * (steps * WORDS) + place[None, :]
    x_row_ptr = x_ptr + row.to(tl.int64)[:, None] * x_stride + place[None, :]
    in_outputs = output < outputs
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for step in tl.range(split * steps // SPLITS, (split + 1) * steps // SPLITS, num_stages=STAGES):
        words = tl.load(word_ptr + step * WORDS, in_outputs[:, None], other=0)
        block = step // (128 // WORDS)
        # A product, for the compiler to see that x stays aligned.
        part = step % (128 // WORDS) * WORDS
        for group in tl.static_range(8):
            first = block * 1024 + group * 128
            # The last block's last groups may lie beyond the inputs: each as a whole, so the mask is by rows.
            rows_here = tl.where(first < inputs, rows, 0)
            x = tl.load(x_row_ptr + first + part, (row < rows_here)[:, None], other=0.0)
            packed = tl.load(scales_ptr + (block * 8 + group) * outputs + output, in_outputs, other=0)
            codes = _codes(words, packed >> 16, group, x_ptr.dtype.element_ty, IN_TWOS)
            scale = packed.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            total += tl.dot(codes, x.T, input_precision="ieee") * scale[:, None]
    last = True
    if SPLITS > 1:
        total, last = add_splits(
            total, parts_ptr, arrivals_ptr, output_tile * row_tiles + row_tile, split, OUTPUTS, ROWS, SPLITS
        )
    if last:
        if BIAS:
            total += tl.load(bias_ptr + output, in_outputs, other=0.0).to(tl.float32)[:, None]
        out = out_ptr + row.to(tl.int64)[None, :] * outputs + output[:, None]
        tl.store(out, total.to(out_ptr.dtype.element_ty), in_outputs[:, None] & (row < rows)[None, :])


@triton.jit
def _codes(words, zero, GROUP: tl.constexpr, DTYPE: tl.constexpr, IN_TWOS: tl.constexpr):
    """Return code - zero of one group of each word, [outputs, words], for zero [outputs]."""
    is_bf16: tl.constexpr = DTYPE.primitive_bitwidth == 16 and DTYPE.fp_mantissa_width == 7
    if IN_TWOS:
        half = tl.full(words.shape, 0x5410 if GROUP < 4 else 0x7632, tl.int32)
        shift = tl.full(words.shape, 4 * (GROUP % 4), tl.int32)
        base = tl.broadcast_to((zero.to(tl.float32) + (128.0 if is_bf16 else 1024.0)).to(DTYPE)[:, None], words.shape)
        operands = [words, base, half, shift]
        # The type must be spelled out: the compiler does not take it from a parameter.
        if is_bf16:
            codes = tl.inline_asm_elementwise(_TWO_BF16, _OPERANDS, operands, tl.bfloat16, is_pure=True, pack=2)
        else:
            codes = tl.inline_asm_elementwise(_TWO_FP16, _OPERANDS, operands, tl.float16, is_pure=True, pack=2)
    else:
        codes = (((words >> (4 * GROUP)) & 15) - zero[:, None]).to(tl.float32).to(DTYPE)
    return codes
