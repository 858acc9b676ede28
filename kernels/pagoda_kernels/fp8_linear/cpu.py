"""fp8_linear for CPUs, which have no 8-bit products: the weight is dequantised once, x is rounded through e4m3."""

import torch
from torch import Tensor

from .. import linear as plain
from ..linear import cpu as linear_cpu
from . import Fp8Rows, Fp8Weight, PackedFp8Weight
from .quantise import as_rows


def pack_fp8_linear(weight: Fp8Weight) -> PackedFp8Weight:
    """See PackFp8Linear. Takes the memory of a float32 weight."""
    packed = linear_cpu.pack_linear(weight.values.float() * weight.scales[:, None])
    return PackedFp8Weight(packed.data, None, None, packed.out_features, packed.in_features)


def fp8_linear(x: Tensor | Fp8Rows, packed: PackedFp8Weight, bias: Tensor | None = None) -> Tensor:
    """See Fp8Linear."""
    return rounded_product(rounded(x), packed, bias).to(x.dtype)


def rounded(x: Tensor | Fp8Rows) -> Tensor:
    """Return what x [T, in] stands for once it is quantised, in float32."""
    if x.shape[0] == 0:
        return torch.empty(x.shape)
    rows = as_rows(x)
    return rows.values.float() * rows.scales[:, None]


def rounded_product(x: Tensor, packed: PackedFp8Weight, bias: Tensor | None) -> Tensor:
    """Return the product of a rounded x in float32."""
    if x.shape[0] == 0:
        return x.new_empty(0, packed.out_features)
    weight = plain.PackedWeight(packed.data, packed.out_features, packed.in_features)
    return linear_cpu.linear(x, weight, None if bias is None else bias.float())
