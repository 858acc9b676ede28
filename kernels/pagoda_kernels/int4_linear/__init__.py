"""int4_linear: a matrix product with a weight of 4-bit integers, in groups of 128 inputs that share scale and zero."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

GROUP = 128
"""Inputs that share a scale and a zero: what AWQ and GPTQ checkpoints use."""


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A weight of (codes - zeros) * scales, each group's zero and scale for its 128 inputs.

    Raises ValueError for inputs that are no whole groups, outputs that are no multiple of 8, or other shapes or dtypes.
    """

    codes: Tensor
    """[out, in], uint8, 0 to 15."""
    zeros: Tensor
    """[out, in / 128], uint8, 0 to 15."""
    scales: Tensor
    """[out, in / 128], float16."""

    def __post_init__(self) -> None:
        dtypes = (self.codes.dtype, self.zeros.dtype, self.scales.dtype)
        if dtypes != (torch.uint8, torch.uint8, torch.float16):
            raise ValueError(f"an int4 weight has uint8 codes and zeros and float16 scales, not {dtypes}: convert them")
        out_features, in_features = self.codes.shape
        if in_features % GROUP or out_features % 8:
            raise ValueError(
                f"an int4 weight has inputs in groups of {GROUP} and outputs in eights, not [{out_features}, "
                f"{in_features}]: leave this matrix unquantised"
            )
        groups = (out_features, in_features // GROUP)
        if self.zeros.shape != groups or self.scales.shape != groups:
            raise ValueError(
                f"zeros {tuple(self.zeros.shape)} and scales {tuple(self.scales.shape)} must be {groups} for codes "
                f"[{out_features}, {in_features}]"
            )


@dataclass(frozen=True, eq=False)
class PackedInt4Weight:
    """A weight in the layout of the implementation that packed it; only that implementation can read the fields."""

    data: Tensor
    scales: Tensor | None
    arrivals: Tensor | None
    out_features: int
    in_features: int


class PackInt4Linear(Protocol):
    def __call__(self, weight: Int4Weight) -> PackedInt4Weight:
        """Pack a weight, once, when the model is loaded. Products of one packed weight run one after the other."""


class Int4Linear(Protocol):
    def __call__(self, x: Tensor, packed: PackedInt4Weight, bias: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias, [T, out], contiguous, in x.dtype, for x [T, in] (any strides, T may be 0)."""
