"""Weights in fp8: our own quantiser, and the layout of compressed-tensors checkpoints."""

import torch
from torch import Tensor

from . import E4M3_MAX, SMALLEST_SCALE, Fp8Rows, Fp8Weight


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 values [T, in] and float32 scales [T] with x ≈ values * scales[:, None].

    The scale is max|x| times the float32 number nearest to 1 / 448, as whoever divides by a constant may compute it;
    values are rounded to nearest, ties to even.
    """
    wide = x.float()
    scales = (wide.abs().amax(dim=1) * (1 / E4M3_MAX)).clamp(min=SMALLEST_SCALE)
    values = (wide / scales[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values, scales


def as_rows(x: Tensor | Fp8Rows) -> Fp8Rows:
    """Quantise x [T, in] unless it is already."""
    return x if isinstance(x, Fp8Rows) else Fp8Rows(*quantise_rows(x), x.dtype)


def quantise(weight: Tensor) -> Fp8Weight:
    """Quantise a weight [out, in] with a scale for each output."""
    return Fp8Weight(*quantise_rows(weight))


def from_compressed_tensors(weight: Tensor, weight_scale: Tensor) -> Fp8Weight:
    """Read a checkpoint's `weight` [out, in], float8_e4m3fn, and `weight_scale` [out, 1], or [1] for the whole weight.

    That is compressed-tensors' format "float-quantized" with 8 bits, strategy "channel" or "tensor". Raises ValueError
    for another dtype or shape.
    """
    scales = weight_scale.float().flatten()
    return Fp8Weight(weight.contiguous(), scales.expand(weight.shape[0]).contiguous() if len(scales) == 1 else scales)
