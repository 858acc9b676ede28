"""The comparer itself: it must fail when it should, and say where."""

import pytest
import torch
from pagoda_kernels.testing import PoisonedEmpty, compare


def test_compare_names_the_worst_element() -> None:
    expected = torch.ones(3, 4)
    actual = expected.clone()
    actual[1, 2] = 1.5
    with pytest.raises(AssertionError, match=r"maximum relative error 0.5 .*worst at \(1, 2\): got 1.5, expected 1"):
        compare(actual, expected, 1e-3)
    compare(actual, expected, 0.6, rms_rel=0.2)
    with pytest.raises(AssertionError, match="RMS"):
        compare(actual, expected, 0.6, rms_rel=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_compare_never_accepts_what_is_not_finite(value: float) -> None:
    broken = torch.tensor([1.0, value])
    with pytest.raises(AssertionError, match=r"worst at \(1,\)"):
        compare(broken, torch.ones(2), 1e9, 1e9)
    with pytest.raises(AssertionError, match=r"worst at \(1,\)"):
        compare(broken, broken, 1e9, 1e9)


def test_compare_checks_shape_and_dtype() -> None:
    with pytest.raises(AssertionError, match="shape"):
        compare(torch.zeros(2), torch.zeros(2, 1), 1)
    with pytest.raises(AssertionError, match="float64"):
        compare(torch.zeros(2).double(), torch.zeros(2), 1)


def test_poisoned_empty_fills_what_nobody_wrote() -> None:
    with PoisonedEmpty():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2, 2)).isnan().all()
        assert torch.zeros(2).new_empty(4, dtype=torch.int32).max() < -(2**30)
        assert not torch.zeros(3).isnan().any()
    torch.empty(3)
