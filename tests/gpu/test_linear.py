"""linear on a GPU against float64 products: cuBLAS and the matrix-vector kernel."""

import pytest
import torch
from pagoda_kernels.linear.cases import CASES, Case
from pagoda_kernels.testing import PoisonedEmpty, compare

VECTORS = (
    Case("vector", 1, 1024, 96),
    Case("vector_bias_odd_rows", 1, 520, 33, bias=True),
    Case("vector_strided_ends", 1, 2056, 7, strided=True),
    Case("vector_one_output", 1, 512, 1),
)
LLAMA = tuple(
    pytest.param(Case(f"llama_{outputs}_{inputs}", 1, inputs, outputs), marks=pytest.mark.native)
    for outputs, inputs in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096))
)


# In the interpreter the vectors below are enough: the rest is cuBLAS, or a program for each of many outputs.
SHARED = tuple(pytest.param(case, marks=pytest.mark.native) if case.name == "one_row" else case for case in CASES)


@pytest.mark.parametrize("case", [*SHARED, *VECTORS, *LLAMA], ids=lambda case: case.name)
def test_linear_agrees_with_float64(case: Case, dtype: torch.dtype, bounds: tuple[float, float], device: str) -> None:
    from pagoda_kernels.linear import kernel

    inputs = case.make(dtype, device)
    expected = inputs.x.double() @ inputs.weight.double().T
    if inputs.bias is not None:
        expected += inputs.bias.double()
    packed = kernel.pack_linear(inputs.weight)
    with PoisonedEmpty():
        actual = kernel.linear(inputs.x, packed, inputs.bias)
    compare(actual, expected.to(dtype), *bounds)
    assert actual.is_contiguous()


def test_a_vector_of_any_width(device: str) -> None:
    """The kernel itself, for widths that `linear` leaves to cuBLAS."""
    from pagoda_kernels.linear import kernel

    for case in (Case("narrow", 1, 77, 13, bias=True), Case("one_by_one", 1, 1, 1)):
        inputs = case.make(device=device)
        actual = kernel.matrix_vector(inputs.x, kernel.pack_linear(inputs.weight), inputs.bias)
        compare(actual, torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias), 1e-5)
