"""The specification of linear, in plain torch: the packed weight is the weight itself."""

import torch
from torch import Tensor
from torch.nn import functional

from . import PackedWeight


def pack_linear(weight: Tensor) -> PackedWeight:
    """See PackLinear."""
    out_features, in_features = weight.shape
    return PackedWeight(weight, out_features, in_features)


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """See Linear."""
    return functional.linear(x, packed.data, bias)


def linear_onto(x: Tensor, packed: PackedWeight, residual: Tensor) -> bool:
    """See LinearOnto."""
    torch.addmm(residual, x, packed.data.t(), out=residual)
    return True
