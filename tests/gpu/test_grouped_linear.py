"""The kernel of grouped_linear against the reference in float32."""

import pytest
import torch
from pagoda_kernels.grouped_linear import reference
from pagoda_kernels.grouped_linear.cases import CASES, Case
from pagoda_kernels.testing import PoisonedEmpty, compare

LARGE = (
    Case("mixtral_decode", (3, 70, 0, 12, 33, 1, 64, 9), 4096, 14336),
    Case("mixtral_prefill", (300, 700, 0, 128, 1024, 1, 257, 9), 4096, 2048),
    Case("many_experts", tuple(range(64)), 2048, 768),
)


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.native) for case in LARGE)],
    ids=lambda case: case.name,
)
def test_grouped_linear_agrees_with_the_reference(
    case: Case, dtype: torch.dtype, bounds: tuple[float, float], device: str
) -> None:
    from pagoda_kernels.grouped_linear import kernel

    inputs = case.make(dtype, device)
    expected = reference.grouped_linear(inputs.x.double(), inputs.weight.double(), inputs.expert_starts)
    with PoisonedEmpty():
        actual = kernel.grouped_linear(inputs.x, inputs.weight, inputs.expert_starts)
    compare(actual, expected.to(dtype), *bounds)
    assert actual.is_contiguous()


@pytest.mark.parametrize("each", [1, 20, 60, pytest.param(100, marks=pytest.mark.native)])
def test_every_plan(each: int, device: str) -> None:
    from pagoda_kernels.grouped_linear import kernel

    inputs = Case("plan", (each, 0, 2 * each), 64, 40).make(device=device)
    tiles = kernel.plan_tiles(each, 1)
    actual = kernel.launch(inputs.x, inputs.weight, inputs.expert_starts, tiles)
    compare(actual, reference.grouped_linear(inputs.x, inputs.weight, inputs.expert_starts), 1e-5)


def test_rows_of_no_expert_are_padding(device: str) -> None:
    from pagoda_kernels.grouped_linear import kernel

    inputs = Case("padded", (4, 9, 7)).make(device=device)
    inputs.expert_starts[3] = 13
    inputs.x[13:] = float("nan")
    actual = kernel.grouped_linear(inputs.x, inputs.weight, inputs.expert_starts)
    expected = reference.grouped_linear(inputs.x, inputs.weight, inputs.expert_starts)
    compare(actual[:13], expected[:13], 1e-5)
