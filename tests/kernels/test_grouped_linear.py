"""grouped_linear against float64, row by row."""

import pytest
import torch
from pagoda_kernels.grouped_linear.cases import CASES, Case
from pagoda_kernels.grouped_linear.reference import grouped_linear
from pagoda_kernels.testing import PoisonedEmpty, compare


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_row_meets_its_experts_matrix(case: Case) -> None:
    inputs = case.make()
    experts = torch.tensor([e for e, count in enumerate(case.counts) for _ in range(count)], dtype=torch.int64)
    expected = (inputs.weight.double()[experts] @ inputs.x.double().unsqueeze(2)).squeeze(2)
    with PoisonedEmpty():
        actual = grouped_linear(inputs.x, inputs.weight, inputs.expert_starts)
    compare(actual, expected.float(), 1e-5)
    assert actual.is_contiguous()
