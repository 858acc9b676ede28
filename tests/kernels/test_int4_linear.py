"""int4_linear against float64 products, and the published layouts bit by bit."""

from dataclasses import replace

import pytest
import torch
from pagoda_kernels.int4_linear import GROUP, Int4Linear, Int4Weight, PackInt4Linear, cpu, reference
from pagoda_kernels.int4_linear.cases import CASES, Case, random_weight
from pagoda_kernels.int4_linear.layout import pack_codes, pack_scales
from pagoda_kernels.int4_linear.layouts import (
    PublishedInt4,
    from_awq,
    from_gptq,
    from_pack_quantised,
    quantise,
    to_awq,
    to_gptq,
    to_pack_quantised,
)
from pagoda_kernels.testing import compare

IMPLEMENTATIONS = [(reference.pack_int4_linear, reference.int4_linear), (cpu.pack_int4_linear, cpu.int4_linear)]


@pytest.mark.parametrize(("pack", "int4_linear"), IMPLEMENTATIONS, ids=["reference", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_int4_linear_is_the_product(case: Case, pack: PackInt4Linear, int4_linear: Int4Linear) -> None:
    inputs = case.make()
    expected = inputs.x.double() @ numbers(inputs.weight).T
    if inputs.bias is not None:
        expected += inputs.bias.double()
    actual = int4_linear(inputs.x, pack(inputs.weight), inputs.bias)
    compare(actual, expected.float(), 5e-6)
    assert actual.is_contiguous()


def numbers(weight: Int4Weight) -> torch.Tensor:
    """Return the weight in float64."""
    zeros, scales = (t.double().repeat_interleave(GROUP, dim=1) for t in (weight.zeros, weight.scales))
    return (weight.codes.double() - zeros) * scales


def same(a: Int4Weight, b: Int4Weight) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.zeros, b.zeros) and torch.equal(a.scales, b.scales)


def test_all_layouts_come_back_as_they_went() -> None:
    weight = random_weight(24, 3 * GROUP, "cpu", 0)
    assert same(from_awq(to_awq(weight)), weight)
    assert same(from_gptq(to_gptq(weight)), weight)
    assert same(from_pack_quantised(to_pack_quantised(weight)), weight)
    eights = replace(weight, zeros=torch.full_like(weight.zeros, 8))
    assert same(from_pack_quantised(to_pack_quantised(eights, zeros=False)), eights)
    with pytest.raises(ValueError, match="zeros: without a tensor of them all are 8"):
        to_pack_quantised(weight, zeros=False)


def test_awq_holds_eight_outputs_in_its_own_order() -> None:
    """From the low bits up, outputs 0 2 4 6 1 3 5 7, as in AWQ's GEMM kernels."""
    codes = torch.zeros(8, GROUP, dtype=torch.uint8)
    codes[:, 5] = torch.arange(1, 9)
    weight = Int4Weight(codes, torch.arange(8, dtype=torch.uint8)[:, None], torch.ones(8, 1).half())
    published = to_awq(weight)
    assert published.qweight.shape == (GROUP, 1)
    assert published.qweight.dtype == torch.int32
    assert int(published.qweight[5]) & 0xFFFFFFFF == 0x86427531
    assert published.qzeros.tolist() == [[0x75316420]]
    assert published.scales.shape == (1, 8)


def test_gptq_holds_eight_inputs_in_order_and_zeros_less_one() -> None:
    codes = torch.zeros(8, GROUP, dtype=torch.uint8)
    codes[3, 16:24] = torch.arange(1, 9)
    weight = Int4Weight(codes, torch.arange(8, dtype=torch.uint8)[:, None], torch.ones(8, 1).half())
    published = to_gptq(weight)
    assert published.qweight.shape == (GROUP // 8, 8)
    assert int(published.qweight[2, 3]) & 0xFFFFFFFF == 0x87654321
    assert published.qzeros.tolist() == [[0x6543210F]]
    assert published.g_idx is not None
    assert published.g_idx.tolist() == [0] * GROUP


def test_pack_quantised_holds_eight_inputs_of_each_output_in_order() -> None:
    codes = torch.zeros(8, GROUP, dtype=torch.uint8)
    codes[3, 16:24] = torch.arange(1, 9)
    packed = to_pack_quantised(Int4Weight(codes, torch.arange(8, dtype=torch.uint8)[:, None], torch.ones(8, 1).half()))
    assert packed.weight_packed.shape == (8, GROUP // 8)
    assert int(packed.weight_packed[3, 2]) & 0xFFFFFFFF == 0x87654321
    assert packed.weight_scale.shape == (8, 1)
    assert packed.weight_zero_point is not None
    assert packed.weight_zero_point.tolist() == [[0x76543210]]


def test_gptq_with_scattered_groups_is_refused() -> None:
    published = to_gptq(random_weight(8, 2 * GROUP, "cpu", 0))
    assert published.g_idx is not None
    scattered = PublishedInt4(published.qweight, published.qzeros, published.scales, published.g_idx.flip(0))
    with pytest.raises(ValueError, match="desc_act false and group_size 128"):
        from_gptq(scattered)


def test_the_quantiser_is_within_half_a_step() -> None:
    weight = torch.randn(16, 2 * GROUP) + 0.5
    weight[3, :GROUP] = 0
    weight[4, :GROUP] = 7
    quantised = quantise(weight)
    step = quantised.scales.float().repeat_interleave(GROUP, dim=1)
    # Half a step for the code, and half for a zero that is no whole number of steps away.
    assert ((numbers(quantised).float() - weight).abs() <= step * 1.01).all()
    assert (numbers(quantised)[3, :GROUP] == 0).all()
    compare(numbers(quantised)[4, :GROUP].float(), weight[4, :GROUP], 1e-3)


def test_the_cuda_layout_puts_a_group_in_the_same_bits_of_128_elements() -> None:
    weight = random_weight(8, 6 * GROUP, "cpu", 0)
    codes, scales = pack_codes(weight), pack_scales(weight)
    assert codes.dtype == torch.int16
    assert codes.shape == (8, 2 * 128)
    assert torch.equal((codes[:, 128:].int() >> 4) & 15, weight.codes[:, 5 * GROUP :].int())
    assert scales.shape == (8, 8)
    assert torch.equal(scales[5] & 15, weight.zeros[:, 5].int())
    assert torch.equal((scales[5] & -16).view(torch.float32), weight.scales[:, 5].float())
    assert (scales[6:] == 0).all()


@pytest.mark.parametrize(
    ("sizes", "groups", "message"),
    [((8, 100), (8, 1), "groups of 128"), ((7, 128), (7, 1), "eights"), ((8, 256), (8, 1), "must be \\(8, 2\\)")],
    ids=["inputs", "outputs", "scales"],
)
def test_what_is_no_int4_weight_is_refused(sizes: tuple[int, int], groups: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int4Weight(
            torch.zeros(sizes, dtype=torch.uint8), torch.zeros(groups, dtype=torch.uint8), torch.ones(groups).half()
        )
