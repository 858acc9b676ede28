"""The kernels of silu_mul and gelu_mul against their references in float32."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from gpu.fp8_rows import assert_rounded
from pagoda_kernels.gelu_mul.reference import gelu_mul
from pagoda_kernels.silu_mul.cases import CASES, Case
from pagoda_kernels.silu_mul.reference import silu_mul
from pagoda_kernels.testing import PoisonedEmpty, compare
from torch import Tensor

LARGE = (Case("llama_decode", 256, 14336), Case("more_rows_than_65535", 70000, 64))
Op = Callable[[Tensor], Tensor]

each_op = pytest.mark.parametrize("reference", [silu_mul, gelu_mul], ids=lambda op: op.__name__)


def kernel(reference: Op) -> Op:
    op: Op = getattr(import_module(f"pagoda_kernels.{reference.__name__}.kernel"), reference.__name__)
    return op


@each_op
@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.native) for case in LARGE)],
    ids=lambda case: case.name,
)
def test_the_kernel_agrees_with_the_reference(
    reference: Op, case: Case, dtype: torch.dtype, bounds: tuple[float, float], device: str
) -> None:
    if dtype == torch.float16 and case.name == "saturated":
        pytest.skip("the products are beyond float16's range")
    gate_up = case.make(dtype, device)
    before = gate_up.clone()
    with PoisonedEmpty():
        actual = kernel(reference)(gate_up)
    compare(actual, reference(gate_up.float()).to(dtype), *bounds)
    assert torch.equal(gate_up, before)
    assert actual.is_contiguous()


@each_op
def test_rows_may_be_strided(reference: Op, device: str) -> None:
    wide = Case("wide", 5, 100).make(device=device)
    for view in (wide[:, 3:151], wide[:, ::2]):
        compare(kernel(reference)(view), reference(view), 1e-5)


@pytest.mark.native  # The interpreter loses the carry when it rounds to 8 bits.
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.name)
def test_quantised_it_is_what_fp8_linear_would_make_of_it(case: Case, dtype: torch.dtype, device: str) -> None:
    from pagoda_kernels.silu_mul.kernel import silu_mul as plain
    from pagoda_kernels.silu_mul.kernel import silu_mul_fp8

    if dtype == torch.float32 or (dtype == torch.float16 and case.name == "saturated"):
        pytest.skip("in 16 bits, and within their range")
    gate_up = case.make(dtype, device)
    with PoisonedEmpty():
        rows = silu_mul_fp8(gate_up)
    assert_rounded(rows, plain(gate_up))
