"""silu_linear against float64: the reference, the CPU's and the batch-invariant one."""

import pytest
from pagoda_kernels import batch_invariant
from pagoda_kernels.linear import PackLinear, reference
from pagoda_kernels.linear import cpu as linear_cpu
from pagoda_kernels.linear.cases import Case
from pagoda_kernels.silu_linear import SiluLinear, cpu
from pagoda_kernels.silu_linear import reference as silu_reference
from pagoda_kernels.silu_linear.cases import CASES
from pagoda_kernels.testing import compare

_INVARIANT = batch_invariant.Products()
IMPLEMENTATIONS = {
    "reference": (reference.pack_linear, silu_reference.silu_linear),
    "cpu": (linear_cpu.pack_linear, cpu.silu_linear),
    "batch_invariant": (_INVARIANT.pack_linear, _INVARIANT.silu_linear),
}


@pytest.mark.parametrize(("pack", "silu_linear"), IMPLEMENTATIONS.values(), ids=list(IMPLEMENTATIONS))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_silu_linear_is_the_formula(case: Case, pack: PackLinear, silu_linear: SiluLinear) -> None:
    inputs = case.make()
    product = inputs.x.double() @ inputs.weight.double().T
    if inputs.bias is not None:
        product += inputs.bias.double()
    gate, up = product.chunk(2, dim=1)
    actual = silu_linear(inputs.x, pack(inputs.weight), inputs.bias)
    compare(actual, (gate.sigmoid() * gate * up).float(), 1e-5)
    assert actual.is_contiguous()
