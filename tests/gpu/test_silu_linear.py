"""silu_linear on a GPU against float64: the two ops one after the other, and the fused kernel."""

import pytest
import torch
from pagoda_kernels.linear.cases import Case, Inputs
from pagoda_kernels.silu_linear.cases import CASES
from pagoda_kernels.testing import PoisonedEmpty, compare
from torch import Tensor

LARGE = tuple(
    pytest.param(Case(name, rows, inputs, outputs, strided=strided), marks=pytest.mark.native)
    for name, rows, inputs, outputs, strided in (
        ("llama_few", 64, 4096, 28672, False),
        ("llama_first_fused", 70, 4096, 28672, True),
        ("llama_decodes", 256, 4096, 28672, False),
        ("llama_two_ops", 500, 4096, 28672, False),
        ("llama_ends", 1100, 4096, 28672, True),
        ("llama_prefill", 8192, 4096, 28672, False),
    )
)
# In the interpreter the fused kernel's own cases below are enough: the rest is linear, or a program for each output.
SHARED = tuple(pytest.param(case, marks=pytest.mark.native) if case.name == "one_row" else case for case in CASES)


def expected(inputs: Inputs) -> Tensor:
    product = inputs.x.double() @ inputs.weight.double().T
    if inputs.bias is not None:
        product += inputs.bias.double()
    gate, up = product.chunk(2, dim=1)
    return (gate.sigmoid() * gate * up).to(inputs.x.dtype)


def scaled(inputs: Inputs) -> Inputs:
    """Gates of about one: larger ones' products are beyond float16's range."""
    return Inputs(inputs.x, inputs.weight * inputs.x.shape[1] ** -0.5, inputs.bias)


@pytest.mark.parametrize("case", [*SHARED, *LARGE], ids=lambda case: case.name)
def test_silu_linear_agrees_with_float64(
    case: Case, dtype: torch.dtype, bounds: tuple[float, float], device: str
) -> None:
    from pagoda_kernels.linear import kernel as linear
    from pagoda_kernels.silu_linear import kernel

    inputs = scaled(case.make(dtype, device))
    with PoisonedEmpty():
        actual = kernel.silu_linear(inputs.x, linear.pack_linear(inputs.weight), inputs.bias)
    compare(actual, expected(inputs), *bounds)
    assert actual.is_contiguous()


FUSED = (
    Case("ends_everywhere", 37, 200, 144),
    Case("one_block", 16, 32, 32),
    Case("strided", 70, 96, 96, strided=True),
)


@pytest.mark.parametrize("programs", [1, 3, 100])
@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.name)
def test_the_fused_kernel_of_any_size(
    case: Case, programs: int, dtype: torch.dtype, bounds: tuple[float, float], device: str
) -> None:
    """The kernel itself, for sizes that `silu_linear` leaves to two ops, with few and with too many programs."""
    from pagoda_kernels.silu_linear.kernel import Block, fused

    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the tensor cores round float32 to 10 bits")
    inputs = scaled(case.make(dtype, device))
    block = Block(16, 16, 32, stages=2, warps=4) if device == "cpu" else Block(64, 64, 64, stages=3, warps=4)
    with PoisonedEmpty():
        actual = fused(inputs.x, inputs.weight, block, programs)
    compare(actual, expected(inputs), *bounds)
