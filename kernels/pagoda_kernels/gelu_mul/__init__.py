"""gelu_mul: the gated activation of Gemma's MLPs (GEGLU, Shazeer 2020, arXiv:2002.05202)."""

from typing import Protocol

from torch import Tensor


class GeluMul(Protocol):
    def __call__(self, gate_up: Tensor) -> Tensor:
        """Return gelu(gate) * up, [T, I], for gate_up = [gate | up] of shape [T, 2I].

        gelu is the tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415):
        gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³))).
        Computed in float32, returned contiguous in gate_up.dtype.
        """
