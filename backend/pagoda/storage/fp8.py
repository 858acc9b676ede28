"""Matrices in 8-bit floats (e4m3), multiplied by inputs that are quantised row by row on their way in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from pagoda_kernels import Ops
from pagoda_kernels.fp8_linear import E4M3_MAX, Fp8Weight
from pagoda_kernels.fp8_linear.quantise import from_compressed_tensors, quantise
from torch import Tensor

from pagoda.storage.scheme import Field, Plain, Product

MADE_UP_DEVIATION = 64.0
"""Of made-up e4m3 numbers: the largest one is seven times as far out."""


def check_sizes(out_features: int, in_features: int) -> None:
    if out_features % 16 or in_features % 16:
        raise ValueError(
            f"fp8 weights have sizes that are multiples of 16, not {out_features} x {in_features}: "
            "take a checkpoint that leaves this matrix plain, with the parameter quantization at 'auto'"
        )


class Fp8:
    """As the checkpoint holds them: `weight`, and a `weight_scale` for each output or for the matrix.

    An `input_scale` is read and not used: quantised row by row, inputs are never cut off and lose less.
    """

    rounds_inputs = True

    def __init__(self, *, per_channel: bool, has_input_scale: bool) -> None:
        self._per_channel, self._has_input_scale = per_channel, has_input_scale

    def fields(self, out_features: int, in_features: int) -> dict[str, Field]:
        check_sizes(out_features, in_features)
        scale = Field((out_features, 1), torch.float32, 0) if self._per_channel else Field((), torch.float32, None)
        fields = {"weight": Field((out_features, in_features), torch.float8_e4m3fn, 0), "weight_scale": scale}
        if self._has_input_scale:
            fields["input_scale"] = Field((), torch.float32, None, default=1.0)
        return fields

    def make_up(self, tensors: Mapping[str, Tensor], deviation: float, generator: torch.Generator) -> None:
        weight = tensors["weight"]
        wide = torch.empty(weight.shape, device=weight.device).normal_(0.0, MADE_UP_DEVIATION, generator=generator)
        weight.copy_(wide.clamp_(-E4M3_MAX, E4M3_MAX))
        tensors["weight_scale"].fill_(deviation / MADE_UP_DEVIATION)

    def pack(self, tensors: Mapping[str, Tensor], parts: Sequence[int], ops: Ops) -> Product:
        scale = tensors["weight_scale"]
        if not self._per_channel:
            scale = scale.repeat_interleave(torch.tensor(parts, device=scale.device))
        return _product(from_compressed_tensors(tensors["weight"], scale), ops)


class Fp8OnLoad(Plain):
    """Plain in the checkpoint, quantised with a scale for each output when the layer is prepared."""

    rounds_inputs = True

    def fields(self, out_features: int, in_features: int) -> dict[str, Field]:
        check_sizes(out_features, in_features)
        return super().fields(out_features, in_features)

    def pack(self, tensors: Mapping[str, Tensor], parts: Sequence[int], ops: Ops) -> Product:
        return _product(quantise(tensors["weight"]), ops)


def _product(weight: Fp8Weight, ops: Ops) -> Product:
    return partial(ops.fp8_linear, packed=ops.pack_fp8_linear(weight))
