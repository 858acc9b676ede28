"""Shared cases of linear."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    in_features: int
    out_features: int
    bias: bool = False
    strided: bool = False
    """x is a view of wider rows."""

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.rows, self.in_features + 24, generator=generator).to(device, dtype)
        x = x[:, 8 : self.in_features + 8]
        weight = torch.randn(self.out_features, self.in_features, generator=generator).to(device, dtype)
        bias = torch.randn(self.out_features, generator=generator).to(device, dtype) if self.bias else None
        return Inputs(x if self.strided else x.contiguous(), weight, bias)


CASES = (
    Case("one_row", 1, 576, 960),
    Case("no_rows", 0, 576, 960),
    Case("no_rows_bias", 0, 5, 7, bias=True),
    Case("decode_batch", 33, 576, 576, bias=True),
    Case("prefill", 256, 576, 3072),
    Case("down_projection", 7, 1536, 576),
    Case("strided_rows", 6, 96, 64, strided=True),
    Case("one_strided_row", 1, 96, 64, bias=True, strided=True),
    Case("odd_shapes", 3, 77, 13, bias=True),
    Case("one_by_one", 1, 1, 1, bias=True),
    Case("one_output", 5, 64, 1),
    Case("one_input", 5, 1, 64),
)
