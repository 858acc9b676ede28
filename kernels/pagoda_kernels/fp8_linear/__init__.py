"""fp8_linear: a matrix product of 8-bit floats (e4m3, Micikevicius et al. 2022, arXiv:2209.05433).

The weight has a scale for each output. x is quantised on the way in, with a scale for each row, so both factors are
e4m3 and the sum is float32. What makes x may quantise it as well, while it is at hand: add_rms_norm_fp8, silu_mul_fp8.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

E4M3_MAX = 448.0
"""The largest number of e4m3."""
SMALLEST_SCALE = 2.0**-40
"""A row of zeros gets this scale: any is right, 0 would divide by itself."""


@dataclass(frozen=True, eq=False)
class Fp8Rows:
    """A quantised x, of values * scales[:, None]."""

    values: Tensor
    """[T, in], float8_e4m3fn, contiguous: in each row the numbers nearest to x / scale."""
    scales: Tensor
    """[T], float32: in each row max|x| times 1 / 448."""
    dtype: torch.dtype
    """Of x, and of a product with it."""

    @classmethod
    def empty(cls, rows: int, size: int, like: Tensor) -> "Fp8Rows":
        """Return uninitialised rows for numbers of a tensor's dtype, on its device."""
        values = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=like.device)
        return cls(values, torch.empty(rows, dtype=torch.float32, device=like.device), like.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A weight of values * scales[:, None]; both sizes are multiples of 16, as the matrix units ask for.

    Raises ValueError for other sizes, dtypes or shapes.
    """

    values: Tensor
    """[out, in], float8_e4m3fn, contiguous."""
    scales: Tensor
    """[out], float32."""

    def __post_init__(self) -> None:
        if self.values.dtype != torch.float8_e4m3fn or self.scales.dtype != torch.float32:
            raise ValueError(
                f"an fp8 weight has float8_e4m3fn values and float32 scales, not {self.values.dtype} and "
                f"{self.scales.dtype}: convert them"
            )
        if self.values.dim() != 2 or any(size % 16 for size in self.values.shape):
            raise ValueError(
                f"an fp8 weight's sizes are multiples of 16, not {tuple(self.values.shape)}: leave this matrix in bf16"
            )
        if self.scales.shape != self.values.shape[:1]:
            raise ValueError(
                f"scales {tuple(self.scales.shape)} for a weight {tuple(self.values.shape)}: give one per output"
            )


@dataclass(frozen=True, eq=False)
class PackedFp8Weight:
    """A weight in the layout of the implementation that packed it; only that implementation can read the fields."""

    data: Tensor
    scales: Tensor | None
    arrivals: Tensor | None
    out_features: int
    in_features: int


class PackFp8Linear(Protocol):
    def __call__(self, weight: Fp8Weight) -> PackedFp8Weight:
        """Pack a weight, once, when the model is loaded. Products of one packed weight run one after the other."""


class Fp8Linear(Protocol):
    def __call__(self, x: Tensor | Fp8Rows, packed: PackedFp8Weight, bias: Tensor | None = None) -> Tensor:
        """Return quantised(x) @ weight.T + bias, [T, out], contiguous, in x.dtype.

        x [T, in] (any strides, T may be 0), or quantised already; bias [out].
        """
