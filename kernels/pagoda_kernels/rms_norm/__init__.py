"""rms_norm: root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467).

add_rms_norm has a residual; add_rms_norm_fp8 quantises the result, too.
"""

from typing import Protocol

from torch import Tensor

from ..fp8_linear import Fp8Rows


class RmsNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / sqrt(mean(x²) + eps) * weight over the last dimension.

        x: [..., H], any strides; weight: [H]. Computed in float32, returned contiguous in x.dtype. x is not changed.
        [T, H] normalises the residual stream, [T, heads, D] is the per-head QK norm.
        """


class AddRmsNorm(Protocol):
    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Set residual to residual + x in place and return its rms_norm.

        x, residual: [T, H] of one dtype; weight: [H]. The sum is rounded to residual.dtype before it is normalised,
        so that the next layer sees the same residual as this one.
        """


class AddRmsNormFp8(Protocol):
    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Fp8Rows:
        """Do what add_rms_norm does, and return its result quantised: its rounded numbers, as fp8_linear would."""
