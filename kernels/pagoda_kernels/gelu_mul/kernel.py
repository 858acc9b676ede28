"""gelu_mul in the Triton language."""

from torch import Tensor

from ..gated import gated_mul


def gelu_mul(gate_up: Tensor) -> Tensor:
    """See GeluMul."""
    return gated_mul(gate_up, tanh_gelu=True)
