"""The specification of silu_mul and silu_mul_fp8, in plain torch."""

from torch import Tensor
from torch.nn.functional import silu

from ..fp8_linear import Fp8Rows
from ..fp8_linear.quantise import as_rows


def silu_mul(gate_up: Tensor) -> Tensor:
    """See SiluMul."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return silu(gate).mul_(up).to(gate_up.dtype)


def silu_mul_fp8(gate_up: Tensor) -> Fp8Rows:
    """See SiluMulFp8."""
    return as_rows(silu_mul(gate_up))
