"""silu_mul in the Triton language."""

from torch import Tensor

from ..gated import gated_mul


def silu_mul(gate_up: Tensor) -> Tensor:
    """See SiluMul."""
    return gated_mul(gate_up, tanh_gelu=False)
