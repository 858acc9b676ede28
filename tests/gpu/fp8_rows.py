"""What rows quantised by the kernel that makes them must be."""

import torch
from pagoda_kernels.fp8_linear import E4M3_MAX, SMALLEST_SCALE, Fp8Rows
from torch import Tensor


def assert_rounded(rows: Fp8Rows, plain: Tensor) -> None:
    """Each value is the nearest to the plain kernel's, whose last bit another order of additions may have changed."""
    assert rows.dtype == plain.dtype
    assert rows.values.is_contiguous()
    assert rows.shape == plain.shape
    wide, last_bit = plain.float(), torch.finfo(plain.dtype).eps
    expected = (wide.abs().amax(dim=1) / E4M3_MAX).clamp(min=SMALLEST_SCALE) if len(plain) else wide[:, 0]
    torch.testing.assert_close(rows.scales, expected, rtol=last_bit, atol=0)
    scales = rows.scales[:, None]
    # Half a step: 2^-4 of a normal number, 2^-10 for those below the smallest.
    half_step = torch.maximum(wide.abs() * 2**-4, scales * 2**-10)
    assert ((rows.values.float() * scales - wide).abs() <= half_step + wide.abs() * 1.1 * last_bit).all()
