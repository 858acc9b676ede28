"""The specification of gelu_mul, in plain torch."""

from torch import Tensor
from torch.nn.functional import gelu


def gelu_mul(gate_up: Tensor) -> Tensor:
    """See GeluMul."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return gelu(gate, approximate="tanh").mul_(up).to(gate_up.dtype)
