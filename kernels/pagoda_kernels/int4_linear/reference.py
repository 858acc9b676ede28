"""The specification of int4_linear, in plain torch: the weight is dequantised."""

import torch
from torch import Tensor

from . import GROUP, Int4Weight, PackedInt4Weight


def dequantise(weight: Int4Weight) -> Tensor:
    """Return the weight's numbers, [out, in], float32."""
    codes = weight.codes.float().reshape(*weight.zeros.shape, GROUP)
    return ((codes - weight.zeros[..., None].float()) * weight.scales[..., None].float()).flatten(1)


def pack_int4_linear(weight: Int4Weight) -> PackedInt4Weight:
    """See PackInt4Linear."""
    return PackedInt4Weight(dequantise(weight), None, None, *weight.codes.shape)


def int4_linear(x: Tensor, packed: PackedInt4Weight, bias: Tensor | None = None) -> Tensor:
    """See Int4Linear."""
    return torch.nn.functional.linear(x.float(), packed.data, None if bias is None else bias.float()).to(x.dtype)
