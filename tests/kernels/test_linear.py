"""linear against float64 products, and the life of packed weights."""

import logging
import weakref

import pytest
import torch
from pagoda_kernels.linear import Linear, PackLinear, cpu, reference
from pagoda_kernels.linear.cases import CASES, Case
from pagoda_kernels.testing import compare

IMPLEMENTATIONS = [(reference.pack_linear, reference.linear), (cpu.pack_linear, cpu.linear)]
implementations = pytest.mark.parametrize(("pack", "linear"), IMPLEMENTATIONS, ids=["reference", "cpu"])
needs_onednn = pytest.mark.skipif(not torch._C._has_mkldnn, reason="torch without oneDNN")


@implementations
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_linear_is_the_product(case: Case, pack: PackLinear, linear: Linear) -> None:
    inputs = case.make()
    expected = inputs.x.double() @ inputs.weight.double().T
    if inputs.bias is not None:
        expected += inputs.bias.double()
    packed = pack(inputs.weight)
    actual = linear(inputs.x, packed, inputs.bias)
    compare(actual, expected.float(), 5e-6)
    assert actual.is_contiguous()
    assert (packed.out_features, packed.in_features) == inputs.weight.shape


@implementations
def test_a_transposed_weight_can_be_packed(pack: PackLinear, linear: Linear) -> None:
    x, weight = torch.randn(3, 40), torch.randn(40, 24).T  # [24, 40]
    compare(linear(x, pack(weight)), x @ weight.T, 5e-6)


@needs_onednn
def test_a_packed_weight_is_a_copy_that_lets_the_original_go() -> None:
    weight = torch.randn(64, 96)
    x, expected = torch.eye(96), weight.T.clone()
    original = weakref.ref(weight.untyped_storage())
    packed = cpu.pack_linear(weight)
    weight.zero_()
    del weight
    assert original() is None
    compare(cpu.linear(x, packed), expected, 1e-6)


def test_an_unpackable_dtype_falls_back_with_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    inputs = Case("low", 4, 32, 16).make(torch.float64)
    with caplog.at_level(logging.WARNING):
        packed = cpu.pack_linear(inputs.weight)
    assert "F.linear" in caplog.text
    assert torch.equal(cpu.linear(inputs.x, packed), inputs.x @ inputs.weight.T)
