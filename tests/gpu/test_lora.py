"""The kernels of add_lora against the reference."""

import pytest
import torch
from pagoda_kernels.lora import reference
from pagoda_kernels.lora.cases import CASES, Case
from pagoda_kernels.testing import PoisonedEmpty, compare

LARGE = (
    Case("llama_decode", tuple(i * 7 % 10 - 1 for i in range(256)), 9, 16, 4096, 6144),
    Case("llama_prefill", (3,) * 700 + (-1,) * 500 + (0,) * 900, 4, 64, 4096, 6144, strided=True),
)


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.native) for case in LARGE)],
    ids=lambda case: case.name,
)
def test_add_lora_agrees_with_the_reference(
    case: Case, dtype: torch.dtype, bounds: tuple[float, float], device: str
) -> None:
    from pagoda_kernels.lora import kernel

    inputs, expected = case.make(dtype, device), case.make(dtype, device)
    before = inputs.out.clone()
    with PoisonedEmpty():
        inputs.run(kernel.add_lora)
    expected.run(reference.add_lora)
    compare(inputs.out, expected.out, *bounds)
    alone = inputs.adapters < 0
    assert torch.equal(inputs.out[alone], before[alone])
