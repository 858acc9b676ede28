"""gelu_mul against float64."""

import math

import pytest
import torch
from pagoda_kernels.gelu_mul.cases import CASES, Case
from pagoda_kernels.gelu_mul.reference import gelu_mul
from pagoda_kernels.testing import compare


def exact(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=1)
    return gate / 2 * (1 + (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)).tanh()) * up


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gelu_mul_is_the_formula(case: Case) -> None:
    gate_up = case.make()
    before = gate_up.clone()
    compare(gelu_mul(gate_up), exact(gate_up).float(), 1e-6)
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    gate_up = Case("low", 8, 64).make(dtype)
    compare(gelu_mul(gate_up), exact(gate_up).to(dtype), torch.finfo(dtype).eps)
