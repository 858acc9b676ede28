"""The specification of silu_linear, in plain torch: linear, then silu_mul."""

from torch import Tensor

from ..linear import PackedWeight
from ..linear.reference import linear
from ..silu_mul.reference import silu_mul


def silu_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """See SiluLinear."""
    return silu_mul(linear(x, packed, bias))
