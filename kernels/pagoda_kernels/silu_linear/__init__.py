"""silu_linear: the first half of Llama-like MLPs, the product of gate and up and its gated activation, as one op."""

from typing import Protocol

from torch import Tensor

from ..linear import PackedWeight


class SiluLinear(Protocol):
    def __call__(self, x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """Return silu(gate) * up, [T, I], contiguous, in x.dtype, for [gate | up] = x @ weight.T + bias.

        x [T, in] (any strides, T may be 0), bias [2I]. The weight [2I, in] is packed by the device's pack_linear, the
        rows of gate first. Gate and up may be rounded to x.dtype before the activation, which is computed in float32.
        """
