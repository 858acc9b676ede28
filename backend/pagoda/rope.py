"""Tables of rotary embeddings, one row a position (https://arxiv.org/abs/2104.09864), for every kind of scaling.

Two kinds depend on the context's length: a dynamic base grows with it, and longrope has factors for contexts within
the original length and others beyond it. A cached key is never rotated again, so one choice must hold for all requests:
it is made for the longest context the engine admits, `max_model_len`, and said in the log where it matters.
"""

from __future__ import annotations

import logging
import math

import torch

from pagoda.hf_rope import Dynamic, Linear, Llama3, LongRope, Rope, Scaling, Yarn

log = logging.getLogger("pagoda.rope")


def tables(rope: Rope, max_model_len: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [max_model_len, rope.size / 2] float32 each."""
    _warn_of_stretching(rope.scaling, max_model_len)
    frequencies = inverse_frequencies(rope, max_model_len)
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), frequencies)
    factor = attention_factor(rope.scaling)
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def inverse_frequencies(rope: Rope, max_model_len: int) -> torch.Tensor:
    """Radians a position for each pair of dimensions, [size / 2] float32."""
    scaling = rope.scaling
    theta = _grown_base(rope, scaling, max_model_len) if isinstance(scaling, Dynamic) else rope.theta
    exponents = torch.arange(0, rope.size, 2, dtype=torch.int64).float() / rope.size
    frequencies = 1.0 / (theta**exponents)
    if isinstance(scaling, Linear):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3):
        return _llama3(frequencies, scaling)
    if isinstance(scaling, Yarn):
        return _yarn(frequencies, rope, scaling)
    if isinstance(scaling, LongRope):
        is_long = max_model_len > scaling.original_max_position_embeddings
        return frequencies / torch.tensor(scaling.long_factor if is_long else scaling.short_factor)
    return frequencies


def _warn_of_stretching(scaling: Scaling | None, max_model_len: int) -> None:
    """Say it when contexts of the original length are rotated otherwise than if no longer ones were admitted."""
    if not isinstance(scaling, LongRope | Dynamic):
        return
    original = scaling.original_max_position_embeddings
    if max_model_len > original:
        chosen = "set of long factors" if isinstance(scaling, LongRope) else f"base grown for {max_model_len} tokens"
        log.warning(
            "rotations: the %s holds for every request, also for texts that stay within the original %d tokens and "
            "would be a little better without; if none is longer, set max_model_len to %d",
            chosen,
            original,
            original,
        )


def attention_factor(scaling: Scaling | None) -> float:
    """What cos and sin are multiplied by, so that attention stays as sharp over a stretched context."""
    if isinstance(scaling, Yarn | LongRope) and scaling.attention_factor is not None:
        return scaling.attention_factor
    if isinstance(scaling, LongRope) and scaling.factor > 1:
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings))
    if isinstance(scaling, Yarn):
        if scaling.mscale and scaling.mscale_all_dim:
            return _yarn_factor(scaling.factor, scaling.mscale) / _yarn_factor(scaling.factor, scaling.mscale_all_dim)
        return _yarn_factor(scaling.factor, 1.0)
    return 1.0


def _grown_base(rope: Rope, scaling: Dynamic, length: int) -> float:
    original = scaling.original_max_position_embeddings
    growth = scaling.factor * max(length, original) / original - (scaling.factor - 1)
    return float(rope.theta * growth ** (rope.size / (rope.size - 2)))


def _llama3(frequencies: torch.Tensor, scaling: Llama3) -> torch.Tensor:
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0, 1)
    return (1 - share) * frequencies / scaling.factor + share * frequencies


def _yarn(frequencies: torch.Tensor, rope: Rope, scaling: Yarn) -> torch.Tensor:
    low, high = (_dimension_of(turns, rope, scaling) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.size - 1)
    ramp = (torch.arange(rope.size // 2, dtype=torch.float32) - low) / (high - low or 0.001)
    stretched = ramp.clamp(0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)


def _dimension_of(turns: float, rope: Rope, scaling: Yarn) -> float:
    """The pair of dimensions that makes so many turns over the original context."""
    wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
    return rope.size * math.log(wavelength) / (2 * math.log(rope.theta))


def _yarn_factor(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
