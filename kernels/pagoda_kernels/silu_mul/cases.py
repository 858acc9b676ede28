"""Shared cases of silu_mul."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    width: int
    """I, half the width of gate_up."""
    magnitude: float = 1.0

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        gate_up = torch.randn(self.rows, 2 * self.width, generator=generator) * self.magnitude
        return gate_up.to(device, dtype)


CASES = (
    Case("one_row", 1, 1536),
    Case("no_rows", 0, 1536),
    Case("decode_batch", 33, 1536),
    Case("prefill", 256, 768),
    Case("odd_width", 3, 77),
    Case("width_1", 2, 1),
    Case("saturated", 4, 128, magnitude=200.0),
)
