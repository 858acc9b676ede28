"""Shared cases of rms_norm and add_rms_norm."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    residual: Tensor
    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    strided: bool = False
    """x is a view of wider rows."""
    magnitude: float = 1.0
    eps: float = 1e-5

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        size = self.shape[-1]
        x = torch.randn(*self.shape[:-1], size + 24, generator=generator) * self.magnitude
        x = x.to(device, dtype)[..., 8 : size + 8]
        residual = torch.randn(self.shape, generator=generator).to(device, dtype)
        weight = (1 + torch.randn(size, generator=generator) / 4).to(device, dtype)
        return Inputs(x if self.strided else x.contiguous(), residual, weight, self.eps)


CASES = (
    Case("one_row", (1, 576)),
    Case("no_rows", (0, 576)),
    Case("decode_batch", (7, 576)),
    Case("prefill", (129, 2048)),
    Case("odd_width", (5, 65)),
    Case("width_1", (3, 1)),
    Case("strided_rows", (6, 96), strided=True),
    Case("per_head", (5, 9, 64), strided=True),
    Case("large_values", (4, 128), magnitude=1e3),
    Case("tiny_values", (4, 128), magnitude=1e-4, eps=1e-6),
)
