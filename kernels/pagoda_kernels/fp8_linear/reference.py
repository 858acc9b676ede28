"""The specification of fp8_linear, in plain torch: both factors are dequantised."""

from torch import Tensor

from . import Fp8Rows, Fp8Weight, PackedFp8Weight
from .quantise import as_rows


def pack_fp8_linear(weight: Fp8Weight) -> PackedFp8Weight:
    """See PackFp8Linear."""
    return PackedFp8Weight(weight.values, weight.scales, None, *weight.values.shape)


def fp8_linear(x: Tensor | Fp8Rows, packed: PackedFp8Weight, bias: Tensor | None = None) -> Tensor:
    """See Fp8Linear."""
    assert packed.scales is not None
    if x.shape[0] == 0:
        return packed.scales.new_empty(0, packed.out_features, dtype=x.dtype)
    rows = as_rows(x)
    out = (rows.values.float() @ packed.data.float().T) * rows.scales[:, None] * packed.scales
    return (out if bias is None else out + bias.float()).to(x.dtype)
