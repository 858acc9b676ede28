"""Kernels compiled ahead are not run, and are there when they are called."""

import pytest
import torch
from pagoda_kernels import compiling_ahead
from pagoda_kernels.rms_norm import reference
from pagoda_kernels.rms_norm.kernel import rms_norm
from pagoda_kernels.testing import PoisonedEmpty, compare

pytestmark = pytest.mark.native


def test_a_kernel_is_compiled_and_not_run(device: str) -> None:
    x = torch.randn(3, 1000, device=device)
    weight = torch.randn(1000, device=device)
    with PoisonedEmpty(), compiling_ahead():
        assert not rms_norm(x, weight, 1e-5).any()
        assert not rms_norm(x, weight, 1e-5).any()
    compare(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), 1e-5)
