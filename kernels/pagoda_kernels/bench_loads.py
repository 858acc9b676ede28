"""What an op offers to the benchmark: each op's cases.py has `bench_loads(device)`, which yields these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .dispatch import Ops
    from .fp8_linear import Fp8Rows


Result: TypeAlias = "Tensor | Fp8Rows | tuple[Tensor | Fp8Rows, ...]"


@dataclass(frozen=True)
class Calls:
    """Three calls over one set of inputs, which `BenchLoad.make` allocates and fills anew for each seed.

    A call may change its inputs in place, as the op does: the benchmark makes inputs of their own, from the same seed,
    for what it compares. Timed calls are captured in a CUDA graph: they must not wait for the device.
    """

    op: Callable[[], Any]
    """The op under test; returns what the op wrote (the changed tensor of an op that works in place)."""
    expected: Callable[[], Result]
    """What `op` must return: integers exactly, floats within the load's bounds. Run once, not timed."""
    torch: Callable[[], Any] | None = None
    """The same by PyTorch's own operations, for the ratio; None if it has nothing like it."""


@dataclass(frozen=True)
class BenchLoad:
    """A row of the benchmark's table."""

    name: str
    """Sizes, and what sets this load apart: '256 x 4096'."""
    make: Callable[[Ops, int], Calls]
    """Return the calls of the device's ops over inputs made from a seed. Different seeds read different memory."""
    bytes: int
    """The fewest bytes the op can move: each input that it needs read once, each output written once."""
    flops: int = 0
    """The operations of its matrix products, 2 for a multiplication and an addition."""
    rate: torch.dtype = torch.bfloat16
    """The element type whose matrix rate bounds the flops."""
    bounds: tuple[float, float] = (2e-2, 4e-3)
    """`compare`'s bounds on the maximum and the RMS relative error: those of bfloat16 unless given."""


@dataclass(frozen=True)
class BenchModel:
    """The model whose shapes are timed."""

    name: str
    dtype: torch.dtype
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    rows: tuple[int, ...]
    """Numbers of tokens."""
    bounds: tuple[float, float]
    """Those of the dtype."""


_ON_GPU = BenchModel("Llama-3.1-8B", torch.bfloat16, 32, 4096, 14336, 32, 8, 128, 128256, (256, 8192), (2e-2, 4e-3))
_ON_CPU = BenchModel(
    "SmolLM2-135M", torch.float32, 30, 576, 1536, 9, 3, 64, 49152, (1, 8, 64, 256), (1e-5, 1e-5)
)  # fmt: skip


def bench_model(device: torch.device) -> BenchModel:
    """Return the model for a device: one that its users run there."""
    return _ON_GPU if device.type == "cuda" else _ON_CPU


def randn(*shape: int, device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal random numbers that depend on nothing but the arguments."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device, dtype=dtype)
