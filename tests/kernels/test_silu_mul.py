"""silu_mul against float64."""

import pytest
import torch
from pagoda_kernels.fp8_linear.quantise import quantise_rows
from pagoda_kernels.silu_mul.cases import CASES, Case
from pagoda_kernels.silu_mul.reference import silu_mul, silu_mul_fp8
from pagoda_kernels.testing import compare


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_silu_mul_is_the_formula(case: Case) -> None:
    gate_up = case.make()
    before = gate_up.clone()
    gate, up = gate_up.double().chunk(2, dim=1)
    compare(silu_mul(gate_up), (gate / (1 + (-gate).exp()) * up).float(), 1e-6)
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    gate_up = Case("low", 8, 64).make(dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    compare(silu_mul(gate_up), (gate.sigmoid() * gate * up).to(dtype), torch.finfo(dtype).eps)


def test_quantised_is_the_same_rounded() -> None:
    gate_up = Case("low", 8, 64).make(torch.bfloat16)
    values, scales = quantise_rows(silu_mul(gate_up))
    rows = silu_mul_fp8(gate_up)
    assert torch.equal(rows.values.float(), values.float())
    assert torch.equal(rows.scales, scales)
    assert rows.dtype == torch.bfloat16
