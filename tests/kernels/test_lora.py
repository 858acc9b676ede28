"""add_lora against float64, row by row."""

import pytest
import torch
from pagoda_kernels.lora.cases import CASES, Case, Inputs
from pagoda_kernels.lora.reference import add_lora
from pagoda_kernels.testing import compare


def exact(i: Inputs) -> torch.Tensor:
    out = i.out.double()
    for row, adapter in enumerate(i.adapters.tolist()):
        if adapter >= 0:
            product = i.b[adapter].double() @ (i.a[adapter].double() @ i.x[row].double())
            out[row] += float(i.scales[adapter]) * product
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_row_gets_its_adapter(case: Case) -> None:
    inputs = case.make()
    before, expected = inputs.out.clone(), exact(inputs)
    compare(inputs.run(add_lora), expected.float(), 1e-5)
    alone = inputs.adapters < 0
    assert torch.equal(inputs.out[alone], before[alone])


def test_bfloat16_is_rounded_once() -> None:
    inputs = Case("low", (0, 1, -1, 2), in_features=512).make(torch.bfloat16)
    expected = exact(inputs).to(torch.bfloat16)
    compare(inputs.run(add_lora), expected, torch.finfo(torch.bfloat16).eps)
