"""int4_linear on a GPU against the reference with the same codes."""

import pytest
import torch
from pagoda_kernels.int4_linear import reference
from pagoda_kernels.int4_linear.cases import CASES, Case, random_weight
from pagoda_kernels.testing import PoisonedEmpty, compare

LLAMA = tuple(
    pytest.param(Case(f"llama_{rows}_{outputs}_{groups}", rows, groups, outputs), marks=pytest.mark.native)
    for outputs, groups in ((6144, 32), (28672, 32), (4096, 112))
    for rows in (1, 2, 16, 17, 64, 100, 256, 300)
)


@pytest.mark.parametrize("case", [*CASES, *LLAMA], ids=lambda case: case.name)
def test_int4_linear_agrees_with_the_reference(
    case: Case, dtype: torch.dtype, bounds: tuple[float, float], device: str
) -> None:
    from pagoda_kernels.int4_linear import kernel

    if dtype == torch.float32 and case.out_features > 1000:
        pytest.skip("float32 is for the interpreter: the tensor cores have none")
    inputs = case.make(dtype, device)
    packed = kernel.pack_int4_linear(inputs.weight)
    assert packed.arrivals is not None
    for _ in range(2):
        with PoisonedEmpty():
            actual = kernel.int4_linear(inputs.x, packed, inputs.bias)
        expected = reference.int4_linear(inputs.x, reference.pack_int4_linear(inputs.weight), inputs.bias)
        compare(actual, expected, *bounds)
        assert not packed.arrivals.any()
    assert actual.is_contiguous()


def test_dequantised_is_the_reference_s(device: str) -> None:
    from pagoda_kernels.int4_linear import kernel

    weight = random_weight(16, 11 * 128, device, 0)
    with PoisonedEmpty():
        actual = kernel.dequantise(kernel.pack_int4_linear(weight), torch.float32)
    assert torch.equal(actual, reference.dequantise(weight))
