"""int4_linear on CUDA: one row as a matrix-vector product, up to 256 as tiles, more after dequantising the weight."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from . import Int4Weight, PackedInt4Weight
from .layout import pack_scales, pack_words
from .tiles import ARRIVALS, tiled_product
from .vector import vector_product

__all__ = ["int4_linear", "pack_int4_linear"]

# Beyond, the tiles would unpack the weight more often than it takes to write it down once and let cuBLAS read it.
_MOST_TILED = 256


def pack_int4_linear(weight: Int4Weight) -> PackedInt4Weight:
    """See PackInt4Linear. Takes half a byte for each weight, 4 bytes for each group."""
    arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, device=weight.codes.device)
    return PackedInt4Weight(pack_words(weight), pack_scales(weight), arrivals, *weight.codes.shape)


def int4_linear(x: Tensor, packed: PackedInt4Weight, bias: Tensor | None = None) -> Tensor:
    """See Int4Linear."""
    if x.shape[0] == 0:
        return x.new_empty(0, packed.out_features)
    if x.shape[0] == 1:
        return vector_product(x, packed, bias)
    if x.shape[0] <= _MOST_TILED:
        return tiled_product(x, packed, bias)
    return functional.linear(x, dequantise(packed, x.dtype), bias)


def dequantise(packed: PackedInt4Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight's numbers, [out, in], in a dtype."""
    weight = torch.empty(packed.out_features, packed.in_features, dtype=dtype, device=packed.data.device)
    _dequantise[(packed.out_features, packed.data.shape[1] // 128)](
        packed.data, packed.scales, weight, packed.out_features, packed.in_features, num_warps=1
    )
    return weight


@triton.jit
def _dequantise(words_ptr, scales_ptr, out_ptr, outputs, inputs):
    """A program's share: the 1024 inputs of a block, of one output."""
    output = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    place = tl.arange(0, 128)
    group = tl.arange(0, 8)
    words = tl.load(words_ptr + (output * tl.num_programs(1) + block) * 128 + place)
    packed = tl.load(scales_ptr + (block * 8 + group) * outputs + output)
    codes = (words[None, :] >> (4 * group)[:, None]) & 15
    scale = packed.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    out = (codes - (packed >> 16)[:, None]).to(tl.float32) * scale[:, None]
    input = block * 1024 + group[:, None] * 128 + place[None, :]
    tl.store(out_ptr + output * inputs + input, out.to(out_ptr.dtype.element_ty), input < inputs)
