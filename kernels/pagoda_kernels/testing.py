"""What tests and benchmarks share: a comparer that shows where, and uninitialised memory that shows itself."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def compare(actual: Tensor, expected: Tensor, max_rel: float, rms_rel: float | None = None) -> None:
    """Raise AssertionError, with the coordinates of the worst element, unless actual is close to expected.

    max_rel bounds max|actual - expected| / max|expected|; rms_rel (max_rel / 4 if not given) bounds the root mean
    square of the error relative to that of expected. Shapes and dtypes must agree and all values be finite.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype}, expected {expected.dtype}"
    if expected.numel() == 0:
        return
    got = actual.detach().double()
    want = expected.detach().to(got.device).double()
    error = (got - want).abs()
    worst = _coordinates(torch.where(error.isnan(), float("inf"), error))
    scale = want.abs().amax().clamp(min=1e-30)
    relative = float(error[worst] / scale)
    rms = float(error.square().mean().sqrt() / want.square().mean().sqrt().clamp(min=1e-30))
    bound = max_rel / 4 if rms_rel is None else rms_rel
    if not (relative <= max_rel and rms <= bound):
        raise AssertionError(
            f"maximum relative error {relative:.3g} (bound {max_rel:.3g}), RMS {rms:.3g} (bound {bound:.3g}); "
            f"worst at {worst}: got {got[worst]:.9g}, expected {want[worst]:.9g}"
        )


def _coordinates(error: Tensor) -> tuple[int, ...]:
    index = torch.unravel_index(error.argmax(), error.shape)
    return tuple(int(i) for i in index)


class PoisonedEmpty(TorchFunctionMode):
    """Within this context, memory from torch.empty and its kin holds NaN (integers: their minimum)."""

    _SOURCES = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return poison_(result) if func in self._SOURCES else result


def poison_(x: Tensor) -> Tensor:
    """Fill x with NaN, or with the minimum of an integer type, and return it."""
    return x.fill_(float("nan") if x.dtype.is_floating_point else torch.iinfo(x.dtype).min)
