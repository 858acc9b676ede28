"""The kernel of rms_norm and its kin against the reference in float32."""

import pytest
import torch
from gpu.fp8_rows import assert_rounded
from pagoda_kernels.rms_norm import reference
from pagoda_kernels.rms_norm.cases import CASES, Case
from pagoda_kernels.testing import PoisonedEmpty, compare

LARGE = (
    Case("llama_decode", (256, 4096)),
    Case("llama_prefill", (1000, 4096), strided=True),
    Case("many_heads", (3000, 32, 128), strided=True),
    Case("wide", (3, 20000)),
)
cases = pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.native) for case in LARGE)],
    ids=lambda case: case.name,
)
Bounds = tuple[float, float]


@cases
def test_rms_norm_agrees_with_the_reference(case: Case, dtype: torch.dtype, bounds: Bounds, device: str) -> None:
    from pagoda_kernels.rms_norm import kernel

    inputs = case.make(dtype, device)
    before = inputs.x.clone()
    expected = reference.rms_norm(inputs.x.float(), inputs.weight.float(), inputs.eps)
    with PoisonedEmpty():
        actual = kernel.rms_norm(inputs.x, inputs.weight, inputs.eps)
    compare(actual, expected.to(dtype), *bounds)
    assert actual.is_contiguous()
    assert torch.equal(inputs.x, before)


@cases
def test_add_rms_norm_rounds_the_residual_as_the_reference(
    case: Case, dtype: torch.dtype, bounds: Bounds, device: str
) -> None:
    from pagoda_kernels.rms_norm import kernel

    if len(case.shape) > 2:
        pytest.skip("a residual has two dimensions")
    inputs = case.make(dtype, device)
    residual = inputs.residual.clone()
    expected = reference.add_rms_norm(inputs.x, residual, inputs.weight, inputs.eps)
    with PoisonedEmpty():
        actual = kernel.add_rms_norm(inputs.x, inputs.residual, inputs.weight, inputs.eps)
    assert torch.equal(inputs.residual, residual)
    compare(actual, expected, *bounds)
    assert actual.is_contiguous()


@pytest.mark.native  # The interpreter loses the carry when it rounds to 8 bits.
@cases
def test_quantised_it_is_what_fp8_linear_would_make_of_it(case: Case, dtype: torch.dtype, device: str) -> None:
    from pagoda_kernels.rms_norm import kernel

    if len(case.shape) > 2 or dtype == torch.float32:
        pytest.skip("of two dimensions, and in 16 bits")
    inputs = case.make(dtype, device)
    residual = inputs.residual.clone()
    plain = kernel.add_rms_norm(inputs.x, residual, inputs.weight, inputs.eps)
    with PoisonedEmpty():
        rows = kernel.add_rms_norm_fp8(inputs.x, inputs.residual, inputs.weight, inputs.eps)
    assert torch.equal(inputs.residual, residual)
    assert_rounded(rows, plain)
