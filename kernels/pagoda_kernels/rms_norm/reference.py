"""The specification of rms_norm, add_rms_norm and add_rms_norm_fp8, in plain torch."""

import torch
from torch import Tensor

from ..fp8_linear import Fp8Rows
from ..fp8_linear.quantise import as_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See RmsNorm."""
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps) * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See AddRmsNorm."""
    residual += x
    return rms_norm(residual, weight, eps)


def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Fp8Rows:
    """See AddRmsNormFp8."""
    return as_rows(add_rms_norm(x, residual, weight, eps))
