"""Floats as integers in the same order: what selects by rank searches and compares integers, exactly."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def order_key(x):
    """Return int32 in the order of the float32 x; the sum makes one zero of two. NaN is beyond an infinity."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def from_order_key(key):
    """Return the float32 of an order_key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
