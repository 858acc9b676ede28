"""fp8_linear against float64 products of the same quantised values, and the quantiser's properties."""

import pytest
import torch
from pagoda_kernels import batch_invariant
from pagoda_kernels.fp8_linear import E4M3_MAX, Fp8Linear, Fp8Rows, Fp8Weight, PackFp8Linear, cpu, reference
from pagoda_kernels.fp8_linear.cases import CASES, Case
from pagoda_kernels.fp8_linear.quantise import as_rows, from_compressed_tensors, quantise, quantise_rows
from pagoda_kernels.testing import compare

IMPLEMENTATIONS = [
    (reference.pack_fp8_linear, reference.fp8_linear),
    (cpu.pack_fp8_linear, cpu.fp8_linear),
    (cpu.pack_fp8_linear, batch_invariant.fp8_linear),
]


@pytest.mark.parametrize(("pack", "fp8_linear"), IMPLEMENTATIONS, ids=["reference", "cpu", "batch-invariant"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fp8_linear_is_the_product_of_quantised_factors(case: Case, pack: PackFp8Linear, fp8_linear: Fp8Linear) -> None:
    inputs = case.make()
    values, scales = quantise_rows(inputs.x) if case.rows else (inputs.x, inputs.x[:, 0])
    weight = inputs.weight.values.double() * inputs.weight.scales.double()[:, None]
    expected = (values.double() * scales.double()[:, None]) @ weight.T
    if inputs.bias is not None:
        expected += inputs.bias.double()
    actual = fp8_linear(inputs.x, pack(inputs.weight), inputs.bias)
    compare(actual, expected.float(), 5e-6)
    assert actual.is_contiguous()


@pytest.mark.parametrize(("pack", "fp8_linear"), IMPLEMENTATIONS, ids=["reference", "cpu", "batch-invariant"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_may_be_quantised_already(case: Case, pack: PackFp8Linear, fp8_linear: Fp8Linear) -> None:
    inputs = case.make(torch.bfloat16)
    packed = pack(inputs.weight)
    rows = as_rows(inputs.x) if case.rows else Fp8Rows(inputs.x, inputs.x[:, 0], inputs.x.dtype)
    actual = fp8_linear(rows, packed, inputs.bias)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, fp8_linear(inputs.x, packed, inputs.bias))


def test_the_quantiser_keeps_three_bits_of_every_number() -> None:
    x = torch.randn(20, 320) * torch.logspace(-6, 6, 20)[:, None]
    values, scales = quantise_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    assert torch.equal(values.float().abs().amax(dim=1), torch.full((20,), E4M3_MAX))
    error = (values.float() * scales[:, None] - x).abs()
    # Half a step: 2^-4 of a normal number, 2^-10 for those below the smallest.
    assert (error <= torch.maximum(x.abs() * 2**-4, scales[:, None] * 2**-10) * 1.0001).all()


def test_zeros_stay_zeros() -> None:
    values, scales = quantise_rows(torch.zeros(2, 16))
    assert (values.float() == 0).all()
    assert (scales > 0).all()


def test_a_checkpoint_s_scales_per_channel_or_for_all() -> None:
    weight = quantise(torch.randn(32, 48))
    read = from_compressed_tensors(weight.values, weight.scales[:, None].bfloat16())
    assert torch.equal(read.scales, weight.scales.bfloat16().float())
    one = from_compressed_tensors(weight.values, torch.tensor([0.5]))
    assert torch.equal(one.scales, torch.full((32,), 0.5))


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        (torch.zeros(16, 24), torch.ones(16), "multiples of 16, not \\(16, 24\\)"),
        (torch.zeros(16, 32), torch.ones(1), "one per output"),
        (torch.zeros(16, 32), torch.ones(16).double(), "float32 scales"),
    ],
    ids=["width", "scales", "dtype"],
)
def test_what_is_no_fp8_weight_is_refused(values: torch.Tensor, scales: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fp8Weight(values.to(torch.float8_e4m3fn), scales)
