"""rms_norm and add_rms_norm against float64, and what they promise about their arguments."""

import pytest
import torch
from pagoda_kernels.fp8_linear.quantise import quantise_rows
from pagoda_kernels.rms_norm.cases import CASES, Case
from pagoda_kernels.rms_norm.reference import add_rms_norm, add_rms_norm_fp8, rms_norm
from pagoda_kernels.testing import compare

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def exact(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@cases
def test_rms_norm_is_the_formula(case: Case) -> None:
    inputs = case.make()
    before = inputs.x.clone()
    actual = rms_norm(inputs.x, inputs.weight, inputs.eps)
    compare(actual, exact(inputs.x, inputs.weight, inputs.eps).float(), 1e-6)
    assert torch.equal(inputs.x, before)
    assert actual.is_contiguous()


@cases
def test_add_rms_norm_updates_the_residual(case: Case) -> None:
    inputs = case.make()
    total = inputs.x + inputs.residual
    actual = add_rms_norm(inputs.x, inputs.residual, inputs.weight, inputs.eps)
    assert torch.equal(inputs.residual, total)
    compare(actual, exact(total, inputs.weight, inputs.eps).float(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = Case("low", (8, 256)).make(dtype)
    expected = exact(inputs.x, inputs.weight, inputs.eps).to(dtype)
    compare(rms_norm(inputs.x, inputs.weight, inputs.eps), expected, 2 * torch.finfo(dtype).eps)


def test_quantised_is_the_same_rounded() -> None:
    inputs = Case("low", (8, 256)).make(torch.bfloat16)
    residual = inputs.residual.clone()
    values, scales = quantise_rows(add_rms_norm(inputs.x, residual, inputs.weight, inputs.eps))
    rows = add_rms_norm_fp8(inputs.x, inputs.residual, inputs.weight, inputs.eps)
    assert torch.equal(inputs.residual, residual)
    assert torch.equal(rows.values.float(), values.float())
    assert torch.equal(rows.scales, scales)
    assert rows.dtype == torch.bfloat16
