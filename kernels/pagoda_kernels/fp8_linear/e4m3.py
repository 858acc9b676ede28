"""Rows in registers, quantised: what fp8_linear's own quantiser and those within other kernels do alike."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from . import E4M3_MAX, SMALLEST_SCALE

_LARGEST: tl.constexpr = tl.constexpr(E4M3_MAX)
_INVERSE: tl.constexpr = tl.constexpr(1 / E4M3_MAX)
_SMALLEST: tl.constexpr = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def to_e4m3(x, largest):
    """Return the values and scales [rows] of x [rows, columns] float32: those of quantise.py, for 16-bit numbers.

    largest [rows] is max|x|.
    """
    scale = tl.maximum(largest * _INVERSE, _SMALLEST)
    # x / scale: the product with the inverse, and what it leaves of x. As division rounds, except where all bits of the
    # scale are ones (Markstein 1990), which no 16-bit x / 448 is. Dividing took 3 of 10 µs for 256 x 14336 on an H100.
    inverse = tl.div_rn(1.0, scale)[:, None]
    near = x * inverse
    exact = tl.fma(tl.fma(-near, tl.broadcast_to(scale[:, None], x.shape), x), tl.broadcast_to(inverse, x.shape), near)
    return tl.clamp(exact, -_LARGEST, _LARGEST).to(tl.float8e4nv), scale
