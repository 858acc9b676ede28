"""int4_linear for CPUs: the weight is dequantised once, and the product is linear's."""

from torch import Tensor

from .. import linear as plain
from ..linear import cpu as linear_cpu
from . import Int4Weight, PackedInt4Weight, reference


def pack_int4_linear(weight: Int4Weight) -> PackedInt4Weight:
    """See PackInt4Linear. Takes the memory of a float32 weight."""
    packed = linear_cpu.pack_linear(reference.dequantise(weight))
    return PackedInt4Weight(packed.data, None, None, packed.out_features, packed.in_features)


def int4_linear(x: Tensor, packed: PackedInt4Weight, bias: Tensor | None = None) -> Tensor:
    """See Int4Linear."""
    weight = plain.PackedWeight(packed.data, packed.out_features, packed.in_features)
    return linear_cpu.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
