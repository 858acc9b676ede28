"""linear: a matrix product with a weight that is packed once, when the model is loaded."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in the layout of the implementation that packed it; only that implementation can read `data`."""

    data: Tensor
    out_features: int
    in_features: int


class PackLinear(Protocol):
    def __call__(self, weight: Tensor) -> PackedWeight:
        """Pack weight [out, in]. A packed copy does not keep the original alive."""


class Linear(Protocol):
    def __call__(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias, [T, out], contiguous, for x [T, in] (any strides, T may be 0), bias [out]."""


class LinearOnto(Protocol):
    def __call__(self, x: Tensor, packed: PackedWeight, residual: Tensor) -> bool:
        """Add x @ weight.T to residual [T, out], contiguous, in x.dtype, in place, and return True.

        Or return False, with nothing done, where `linear` and a later `add_rms_norm` are as fast.
        """
