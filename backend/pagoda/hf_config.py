"""A checkpoint's own description: config.json and generation_config.json of a Hugging Face folder, torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from pagoda.errors import CheckpointError
from pagoda.sampling_params import SamplingParams


class RopeScaling(msgspec.Struct, frozen=True):
    """Llama 3's frequency scaling (https://arxiv.org/abs/2407.21783, section 3.2). Lengths in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class HFConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shapes of a decoder. Sizes in elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    default_params: SamplingParams

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of the keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError when the file is absent or no JSON object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.name} is missing in {path.parent}: is this a Hugging Face model folder?"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def load(folder: Path) -> HFConfig:
    """Read a folder's configuration. Raises CheckpointError naming the missing or wrong key."""
    raw = read_json(folder / "config.json")
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.exists() else {}
    try:
        return _parse(raw, generation)
    except KeyError as error:
        raise CheckpointError(f"{folder / 'config.json'} lacks the key {error}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None


def _parse(raw: dict[str, Any], generation: dict[str, Any]) -> HFConfig:
    hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    rope_theta, rope_scaling = _rope(raw)
    return HFConfig(
        architecture=str(raw["architectures"][0]),
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        rms_norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=int(raw["max_position_embeddings"]),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        eos_token_ids=_eos(raw, generation),
        default_params=_default_params(generation),
    )


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "llama3":
        return theta, msgspec.convert(parameters, RopeScaling, strict=False)
    raise ValueError(f"rope_type {kind!r} is not known; known ones: default, llama3")


def _eos(raw: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    ids: set[int] = set()
    for value in (raw.get("eos_token_id"), generation.get("eos_token_id")):
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(ids))


def _default_params(generation: dict[str, Any]) -> SamplingParams:
    """What generation_config.json recommends; greedy folders (do_sample false) recommend nothing."""
    names = ("temperature", "top_p", "top_k", "min_p") if generation.get("do_sample") else ()
    return SamplingParams(**{name: generation[name] for name in names if generation.get(name) is not None})
