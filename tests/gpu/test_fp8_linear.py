"""fp8_linear on a GPU against the reference with the same quantised values.

The interpreter loses the carry when it rounds to 8 bits: there, the products alone.
"""

import pytest
import torch
from pagoda_kernels.fp8_linear import quantise, reference
from pagoda_kernels.fp8_linear.cases import CASES, Case
from pagoda_kernels.testing import PoisonedEmpty, compare

LLAMA = tuple(
    Case(f"llama_{rows}_{outputs}_{inputs}", rows, inputs, outputs)
    for outputs, inputs in ((6144, 4096), (28672, 4096), (4096, 14336))
    for rows in (1, 16, 40, 64, 128, 256, 300)
)


@pytest.mark.native
@pytest.mark.parametrize("case", [*CASES, *LLAMA], ids=lambda case: case.name)
def test_fp8_linear_agrees_with_the_reference(
    case: Case, dtype: torch.dtype, bounds: tuple[float, float], device: str
) -> None:
    from pagoda_kernels.fp8_linear import kernel

    if dtype != torch.bfloat16:
        pytest.skip("the tensor cores add 8-bit products with 14 bits: enough for bfloat16")
    inputs = case.make(dtype, device)
    packed = kernel.pack_fp8_linear(inputs.weight)
    with PoisonedEmpty():
        actual = kernel.fp8_linear(inputs.x, packed, inputs.bias)
    expected = reference.fp8_linear(inputs.x, reference.pack_fp8_linear(inputs.weight), inputs.bias)
    compare(actual, expected, *bounds)
    assert actual.is_contiguous()


@pytest.mark.parametrize("splits", [1, 2], ids=["whole", "split"])
@pytest.mark.parametrize("case", [case for case in CASES if case.rows], ids=lambda case: case.name)
def test_tiles_of_8_bits_with_scales(case: Case, splits: int, device: str) -> None:
    from pagoda_kernels.linear.tiles import Scales, Tile, tiled_product

    inputs = case.make(torch.float32, device)
    values, scales = quantise.quantise_rows(inputs.x)
    tile = Tile(64, 16, 64, stages=3, splits=splits)
    arrivals = torch.zeros(tile.count(case.out_features, case.rows), dtype=torch.int32, device=device)
    with PoisonedEmpty():
        actual = tiled_product(
            values,
            inputs.weight.values,
            inputs.bias,
            tile,
            torch.float32,
            Scales(scales, inputs.weight.scales),
            arrivals,
        )
    expected = reference.fp8_linear(inputs.x, reference.pack_fp8_linear(inputs.weight), inputs.bias)
    # The tensor cores add 8-bit products with 14 bits; the interpreter adds them in float32.
    compare(actual, expected, *((1e-5, 1e-5) if device == "cpu" else (2e-2, 4e-3)))
    assert not arrivals.any()


@pytest.mark.native
@pytest.mark.parametrize("size", [16, 320], ids=str)
def test_the_quantiser_is_the_reference_s(size: int, dtype: torch.dtype, device: str) -> None:
    from pagoda_kernels.fp8_linear import kernel

    x = torch.randn(12, size + 8, generator=torch.Generator().manual_seed(0)).to(device, dtype)[:, 8:]
    x = x * torch.logspace(-3, 3, 12, device=device).to(dtype)[:, None]
    x[5] = 0
    with PoisonedEmpty():
        values, scales = kernel.quantise_rows(x)
    expected_values, expected_scales = quantise.quantise_rows(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values.float(), expected_values.float())
