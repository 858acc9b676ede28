"""How a checkpoint wants its positions rotated, read from config.json in its old and its new words; torch-free.

Old: `rope_theta`, `rope_scaling` (and `rope_local_base_freq`); since transformers 5: `rope_parameters`, one object or,
where layers differ, one a kind of layer. Lengths are in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class Linear(msgspec.Struct, frozen=True, tag_field="rope_type", tag="linear"):
    """Positions divided by a factor (https://arxiv.org/abs/2306.15595)."""

    factor: float


class Dynamic(msgspec.Struct, frozen=True, tag_field="rope_type", tag="dynamic"):
    """A base that grows with the context (NTK-aware scaling, described in https://arxiv.org/abs/2309.00071)."""

    factor: float
    original_max_position_embeddings: int


class Llama3(msgspec.Struct, frozen=True, tag_field="rope_type", tag="llama3"):
    """Long wavelengths stretched, short ones kept (https://arxiv.org/abs/2407.21783, section 3.2)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class Yarn(msgspec.Struct, frozen=True, tag_field="rope_type", tag="yarn"):
    """As Llama3 with a ramp by turns, and warmer attention (https://arxiv.org/abs/2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    """Turns over the original context from which a dimension is kept."""
    beta_slow: float = 1.0
    """Turns below which a dimension is stretched by the whole factor."""
    truncate: bool = True
    """The ends of the ramp are whole dimensions."""
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


class LongRope(msgspec.Struct, frozen=True, tag_field="rope_type", tag="longrope"):
    """A searched factor for each dimension, one set for short and one for long contexts (arXiv:2402.13753)."""

    factor: float
    original_max_position_embeddings: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None


Scaling = Linear | Dynamic | Llama3 | Yarn | LongRope
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


class Rope(msgspec.Struct, frozen=True):
    """One way of rotating: the first `size` dimensions of a head, base `theta`."""

    theta: float
    size: int
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if self.size < 2 or self.size % 2 or self.theta <= 0:
            raise ValueError(f"rope rotates {self.size} dimensions by base {self.theta}: even and positive are allowed")
        if isinstance(self.scaling, LongRope):
            lengths = {len(self.scaling.short_factor), len(self.scaling.long_factor)}
            if lengths != {self.size // 2}:
                raise ValueError(f"longrope needs {self.size // 2} short and long factors, not {sorted(lengths)}")


def parse(raw: Mapping[str, Any], head_dim: int) -> tuple[Rope, Rope | None]:
    """The rotation of a model's layers, and that of its layers with a window where they have their own.

    Raises KeyError, ValueError or msgspec.ValidationError naming what is missing or wrong.
    """
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    local = parameters.get("sliding_attention")
    if "full_attention" in parameters:
        parameters = parameters["full_attention"] or {}
    if local is None and raw.get("rope_local_base_freq") is not None:
        local = {"rope_theta": raw["rope_local_base_freq"]}
    return _rope(raw, parameters, head_dim), None if local is None else _rope(raw, local, head_dim)


def trained_length(raw: Mapping[str, Any], scaling: Scaling | None) -> int:
    """The longest context that the checkpoint's own words allow."""
    stated = max(int(raw["max_position_embeddings"]), int(raw.get("max_sequence_length") or 0))
    if isinstance(scaling, Dynamic | Yarn):
        return max(stated, int(scaling.original_max_position_embeddings * scaling.factor))
    return stated


def _rope(raw: Mapping[str, Any], parameters: Mapping[str, Any], head_dim: int) -> Rope:
    share = parameters.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    theta = parameters.get("rope_theta") or raw.get("rope_theta") or 10000.0
    return Rope(float(theta), int(head_dim * float(share)), _scaling(raw, parameters))


def _scaling(raw: Mapping[str, Any], parameters: Mapping[str, Any]) -> Scaling | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "su" or "long_factor" in parameters:
        kind = "longrope"  # Phi-3's names for it over time
    if kind not in KINDS:
        raise ValueError(f"rope_type {kind!r} is not known; known ones: {', '.join(KINDS)}")
    if kind == "default":
        return None
    given = {name: value for name, value in parameters.items() if value is not None}
    trained = int(raw["max_position_embeddings"])
    original = raw.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or trained
    given["original_max_position_embeddings"] = trained if kind == "dynamic" else int(original)
    if kind in ("yarn", "longrope"):
        given.setdefault("factor", trained / given["original_max_position_embeddings"])
    scaling: Scaling = msgspec.convert({**given, "rope_type": kind}, Scaling, strict=False)
    return scaling
