"""The kernel of gelu_mul against the reference in float32."""

import pytest
import torch
from pagoda_kernels.gelu_mul import reference
from pagoda_kernels.gelu_mul.cases import CASES, Case
from pagoda_kernels.testing import PoisonedEmpty, compare

LARGE = (Case("llama_decode", 256, 14336), Case("more_rows_than_65535", 70000, 64))


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.native) for case in LARGE)],
    ids=lambda case: case.name,
)
def test_gelu_mul_agrees_with_the_reference(
    case: Case, dtype: torch.dtype, bounds: tuple[float, float], device: str
) -> None:
    from pagoda_kernels.gelu_mul import kernel

    if dtype == torch.float16 and case.name == "saturated":
        pytest.skip("the products are beyond float16's range")
    gate_up = case.make(dtype, device)
    before = gate_up.clone()
    with PoisonedEmpty():
        actual = kernel.gelu_mul(gate_up)
    compare(actual, reference.gelu_mul(gate_up.float()).to(dtype), *bounds)
    assert torch.equal(gate_up, before)
    assert actual.is_contiguous()


def test_rows_may_be_strided(device: str) -> None:
    from pagoda_kernels.gelu_mul import kernel

    wide = Case("wide", 5, 100).make(device=device)
    compare(kernel.gelu_mul(wide[:, 3:151]), reference.gelu_mul(wide[:, 3:151]), 1e-5)
    compare(kernel.gelu_mul(wide[:, ::2]), reference.gelu_mul(wide[:, ::2]), 1e-5)
