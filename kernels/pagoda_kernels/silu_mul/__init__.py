"""silu_mul and silu_mul_fp8: the gated activation of Llama-like MLPs (SwiGLU, Shazeer 2020, arXiv:2002.05202)."""

from typing import Protocol

from torch import Tensor

from ..fp8_linear import Fp8Rows


class SiluMul(Protocol):
    def __call__(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up, [T, I], for gate_up = [gate | up] of shape [T, 2I].

        Computed in float32, returned contiguous in gate_up.dtype.
        """


class SiluMulFp8(Protocol):
    def __call__(self, gate_up: Tensor) -> Fp8Rows:
        """Return silu_mul(gate_up) quantised: its rounded numbers, as fp8_linear would."""
