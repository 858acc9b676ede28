"""silu_mul: the gated activation of Llama-like MLPs (SwiGLU, Shazeer 2020, arXiv:2002.05202)."""

from typing import Protocol

from torch import Tensor


class SiluMul(Protocol):
    def __call__(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up, [T, I], for gate_up = [gate | up] of shape [T, 2I].

        Computed in float32, returned contiguous in gate_up.dtype.
        """
