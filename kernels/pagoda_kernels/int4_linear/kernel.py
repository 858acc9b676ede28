"""int4_linear on CUDA: one row as a matrix-vector product, up to 256 as tiles, more after dequantising the weight.

The five matrices of Llama-3.1-8B, all 129 products on an H100, µs (reading the weights once takes 1280):

| rows | this | bf16 cuBLAS |
| --- | --- | --- |
| 1 | 1720 | 5590 |
| 16 | 2260 | 5670 |
| 64 | 3690 | 5870 |
| 128 | 5600 | 6150 |
| 256 | 9630 | 6980 |

From about 128 rows on the products bind, and in a tile they wait for the codes. Dequantising would take as long as the
product in bfloat16, 110 µs for 4096 -> 28672, and does beyond 256.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ..linear.tiles import can_tile
from . import Int4Weight, PackedInt4Weight
from .layout import BLOCK, pack_codes, pack_scales
from .tiles import ARRIVALS, MOST_ROWS, choose_tile, tiled_product
from .vector import vector_product

__all__ = ["int4_linear", "pack_int4_linear"]

# Of a program that dequantises: an int4 weight has a multiple of it.
_OUTPUTS = 8


def pack_int4_linear(weight: Int4Weight) -> PackedInt4Weight:
    """See PackInt4Linear. Takes half a byte for each weight, 4 bytes for each group."""
    arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=weight.codes.device)
    return PackedInt4Weight(pack_codes(weight), pack_scales(weight), arrivals, *weight.codes.shape)


def int4_linear(x: Tensor, packed: PackedInt4Weight, bias: Tensor | None = None) -> Tensor:
    """See Int4Linear."""
    rows = x.shape[0]
    if rows == 0:
        return x.new_empty(0, packed.out_features)
    # The tensor cores have no float32; the interpreter has.
    if rows > MOST_ROWS or (rows > 1 and x.is_cuda and x.dtype == torch.float32):
        return functional.linear(x, dequantise(packed, x.dtype), bias)
    if not can_tile(x) or x.stride(0) < x.shape[1]:
        x = x.clone(memory_format=torch.contiguous_format)
    if rows == 1:
        return vector_product(x, packed, bias)
    return tiled_product(x, packed, bias, choose_tile(rows, packed.out_features))


def dequantise(packed: PackedInt4Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight's numbers, [out, in], in a dtype."""
    weight = torch.empty(packed.out_features, packed.in_features, dtype=dtype, device=packed.data.device)
    _dequantise[(packed.out_features // _OUTPUTS, packed.data.shape[1] // BLOCK)](
        packed.data,
        packed.scales,
        weight,
        packed.out_features,
        packed.in_features,
        OUTPUTS=_OUTPUTS,
        num_warps=4,
    )
    return weight


@triton.jit
def _dequantise(codes_ptr, scales_ptr, out_ptr, outputs, inputs, OUTPUTS: tl.constexpr):
    """A program's share: the 512 inputs of a block, of a few outputs."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    block = tl.program_id(1)
    place = tl.arange(0, 128)[None, :]
    at = output.to(tl.int64)[:, None]
    fours = tl.load(codes_ptr + (at * tl.num_programs(1) + block) * 128 + place).to(tl.int32)
    for group in tl.static_range(4):
        packed = tl.load(scales_ptr + (block * 4 + group) * outputs + output)
        scale = (packed & -16).to(tl.float32, bitcast=True)
        out = (((fours >> (4 * group)) & 15) - (packed & 15)[:, None]).to(tl.float32) * scale[:, None]
        input = block * 512 + group * 128 + place
        tl.store(out_ptr + at * inputs + input, out.to(out_ptr.dtype.element_ty), (input < inputs) & (at >= 0))
