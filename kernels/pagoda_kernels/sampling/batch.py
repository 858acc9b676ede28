"""The sampling parameters of a step, one row per request."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class SamplingBatch:
    """All tensors are [R] and on the device of the logits; the flags are on the host, and spare a plain batch work."""

    temperature: Tensor
    """float32; 0 = greedy."""
    top_k: Tensor
    """int32; 0 = off."""
    top_p: Tensor
    """float32 in (0, 1]; 1 = off."""
    min_p: Tensor
    """float32 in [0, 1]; 0 = off."""
    seeds: Tensor
    """int64 that holds an unsigned 64-bit pattern."""
    positions: Tensor
    """int64: index of the token to be sampled in its request."""
    all_greedy: bool
    """Every temperature is 0."""
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
