"""fp8_linear for CPUs, which have no 8-bit products: the weight is dequantised once, x is rounded through e4m3."""

from torch import Tensor

from .. import linear as plain
from ..linear import cpu as linear_cpu
from . import Fp8Weight, PackedFp8Weight
from .quantise import quantise_rows


def pack_fp8_linear(weight: Fp8Weight) -> PackedFp8Weight:
    """See PackFp8Linear. Takes the memory of a float32 weight."""
    packed = linear_cpu.pack_linear(weight.values.float() * weight.scales[:, None])
    return PackedFp8Weight(packed.data, None, None, packed.out_features, packed.in_features)


def fp8_linear(x: Tensor, packed: PackedFp8Weight, bias: Tensor | None = None) -> Tensor:
    """See Fp8Linear."""
    if x.shape[0] == 0:
        return x.new_empty(0, packed.out_features)
    values, scales = quantise_rows(x)
    weight = plain.PackedWeight(packed.data, packed.out_features, packed.in_features)
    rounded = values.float() * scales[:, None]
    return linear_cpu.linear(rounded, weight, None if bias is None else bias.float()).to(x.dtype)
