"""Matrices in 4-bit integers, in groups of 128 inputs with a scale and a zero, as three published layouts hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from pagoda_kernels import Ops
from pagoda_kernels.int4_linear import GROUP, Int4Weight
from pagoda_kernels.int4_linear.layouts import (
    PackedInt4,
    PublishedInt4,
    from_awq,
    from_gptq,
    from_pack_quantised,
)
from torch import Tensor

from pagoda.storage.scheme import Field, Product

CODES = 8
"""In an int32."""
MADE_UP_DEVIATION = (255 / 12 + 1 / 4) ** 0.5
"""Of codes 0 to 15, all alike often, less a zero that is 7 or 8."""


def check_sizes(out_features: int, in_features: int) -> None:
    if out_features % CODES or in_features % GROUP:
        raise ValueError(
            f"4-bit weights have outputs in eights and inputs in groups of {GROUP}, not {out_features} x "
            f"{in_features}: take a checkpoint that leaves this matrix plain"
        )


def _int32(*shape: int, outputs: int | None) -> Field:
    return Field(shape, torch.int32, outputs)


def _make_up_codes(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.view(torch.uint8).random_(0, 256, generator=generator)


def _make_up_zeros(tensor: Tensor, lower: int, generator: torch.Generator) -> None:
    """Every four bits hold `lower` or one more."""
    codes = tensor.view(torch.uint8)
    codes.random_(0, 256, generator=generator).bitwise_and_(0x11).add_(0x11 * lower)


class Awq:
    """AutoAWQ's "GEMM" version: eight outputs to an int32."""

    rounds_inputs = False

    def fields(self, out_features: int, in_features: int) -> dict[str, Field]:
        check_sizes(out_features, in_features)
        groups, words = in_features // GROUP, out_features // CODES
        return {
            "qweight": _int32(in_features, words, outputs=1),
            "qzeros": _int32(groups, words, outputs=1),
            "scales": Field((groups, out_features), torch.float16, 1),
        }

    def make_up(self, tensors: Mapping[str, Tensor], deviation: float, generator: torch.Generator) -> None:
        _make_up_codes(tensors["qweight"], generator)
        _make_up_zeros(tensors["qzeros"], 7, generator)
        tensors["scales"].fill_(deviation / MADE_UP_DEVIATION)

    def pack(self, tensors: Mapping[str, Tensor], parts: Sequence[int], ops: Ops) -> Product:
        return _product(from_awq(PublishedInt4(tensors["qweight"], tensors["qzeros"], tensors["scales"])), ops)


class Gptq:
    """Eight inputs to an int32, groups of consecutive inputs. Its exporters add biases of zeros to plain models."""

    rounds_inputs = False

    def fields(self, out_features: int, in_features: int) -> dict[str, Field]:
        check_sizes(out_features, in_features)
        groups = in_features // GROUP
        return {
            "qweight": _int32(in_features // CODES, out_features, outputs=1),
            "qzeros": _int32(groups, out_features // CODES, outputs=1),
            "scales": Field((groups, out_features), torch.float16, 1),
            "g_idx": _int32(in_features, outputs=None),
            "bias": Field((out_features,), torch.get_default_dtype(), 0, default=0.0),
        }

    def make_up(self, tensors: Mapping[str, Tensor], deviation: float, generator: torch.Generator) -> None:
        _make_up_codes(tensors["qweight"], generator)
        _make_up_zeros(tensors["qzeros"], 6, generator)  # the layout holds zero - 1
        tensors["scales"].fill_(deviation / MADE_UP_DEVIATION)
        group_of_input = tensors["g_idx"]
        group_of_input.copy_(torch.arange(group_of_input.shape[1], device=group_of_input.device) // GROUP)

    def pack(self, tensors: Mapping[str, Tensor], parts: Sequence[int], ops: Ops) -> Product:
        groups = tensors["g_idx"]
        if not bool((groups == groups[0]).all()):
            raise ValueError("g_idx: matrices that are joined have different groups: quantise with desc_act false")
        return _product(
            from_gptq(PublishedInt4(tensors["qweight"], tensors["qzeros"], tensors["scales"], groups[0])), ops
        )


class PackQuantised:
    """compressed-tensors' "pack-quantized": eight inputs to an int32; without zeros, a code of 8 stands for 0."""

    rounds_inputs = False

    def __init__(self, *, has_zeros: bool) -> None:
        self._has_zeros = has_zeros

    def fields(self, out_features: int, in_features: int) -> dict[str, Field]:
        check_sizes(out_features, in_features)
        groups = in_features // GROUP
        fields = {
            "weight_packed": _int32(out_features, in_features // CODES, outputs=0),
            "weight_scale": Field((out_features, groups), torch.float16, 0),
            "weight_shape": Field((2,), torch.int64, None),
        }
        if self._has_zeros:
            fields["weight_zero_point"] = _int32(out_features // CODES, groups, outputs=0)
        return fields

    def make_up(self, tensors: Mapping[str, Tensor], deviation: float, generator: torch.Generator) -> None:
        _make_up_codes(tensors["weight_packed"], generator)
        tensors["weight_scale"].fill_(deviation / MADE_UP_DEVIATION)
        if self._has_zeros:
            _make_up_zeros(tensors["weight_zero_point"], 7, generator)

    def pack(self, tensors: Mapping[str, Tensor], parts: Sequence[int], ops: Ops) -> Product:
        stored = PackedInt4(tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_zero_point"))
        return _product(from_pack_quantised(stored), ops)


def _product(weight: Int4Weight, ops: Ops) -> Product:
    return partial(ops.int4_linear, packed=ops.pack_int4_linear(weight))
