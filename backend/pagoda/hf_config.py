"""A checkpoint's own description: config.json and generation_config.json of a Hugging Face folder, torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pagoda import hf_quantisation, hf_rope, sampling_params
from pagoda.errors import CheckpointError, InvalidRequest
from pagoda.hf_quantisation import Quantisation
from pagoda.hf_rope import Rope
from pagoda.sampling_params import SamplingParams

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Names in config.json of the gated activations that have a kernel."""

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p")

WINDOW_FROM_MAX_WINDOW_LAYERS = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures of which only the layers from `max_window_layers` on have the window."""

_GEMMA: dict[str, Any] = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "head_dim": 256,
}
SILENT: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"sliding_window": 4096},
    "MixtralForCausalLM": {"rope_theta": 1e6, "norm_topk_prob": True},
    "Qwen2ForCausalLM": {"use_sliding_window": False, "max_window_layers": 28},
    "Qwen3ForCausalLM": {"use_sliding_window": False, "max_window_layers": 28, "head_dim": 128},
    "Qwen3MoeForCausalLM": {"use_sliding_window": False},
    "Gemma2ForCausalLM": {
        **_GEMMA,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "Gemma3ForCausalLM": {
        **_GEMMA,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
}
"""What an architecture means where its config.json is silent: published files leave out what equals a default."""


class MixtureConfig(msgspec.Struct, frozen=True):
    """A mixture of experts. Sizes in elements."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalise: bool
    """The weights of a token's experts add up to 1."""
    layers: tuple[bool, ...]
    """Whether a layer has experts, by layer; the others have a plain MLP."""


class HFConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shapes of a decoder. Sizes in elements, lengths in tokens."""

    architecture: str
    has_own_code: bool
    """config.json points at Python code in the folder, which is never run."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    activation: str
    """`silu` or `gelu_tanh`."""
    rope: Rope
    local_rope: Rope | None
    """The rotation of layers with a window, where it is not that of the others."""
    layer_windows: tuple[int, ...]
    """How many of the latest positions a layer's queries see, their own included; 0: all. By layer."""
    attention_scale: float
    attention_softcap: float
    """0: none."""
    logit_softcap: float
    """0: none."""
    mixture: MixtureConfig | None
    max_position_embeddings: int
    """The longest context the checkpoint is made for, scaling included."""
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str
    quantisation: Quantisation | None
    """How the matrices are stored; None: plain."""
    eos_token_ids: tuple[int, ...]
    default_params: SamplingParams = SamplingParams()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads evenly"
            )

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
    file, generation_file = folder / "config.json", folder / "generation_config.json"
    raw = read_json(file)
    generation = read_json(generation_file) if generation_file.exists() else {}
    try:
        config = _parse(raw, generation)
    except KeyError as error:
        raise CheckpointError(f"{file} lacks the key {error}") from None
    except (TypeError, ValueError, AttributeError, msgspec.ValidationError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    try:
        params = _default_params(generation)
        sampling_params.check(params, vocab_size=config.vocab_size)
    except (InvalidRequest, msgspec.ValidationError) as error:
        raise CheckpointError(f"{generation_file}: {error}") from None
    return msgspec.structs.replace(config, default_params=params)


def _parse(raw: dict[str, Any], generation: dict[str, Any]) -> HFConfig:
    architecture = str((raw["architectures"] or ["none"])[0])
    raw = {**SILENT.get(architecture, {}), **raw}
    hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    head_dim = int(raw.get("head_dim") or hidden // heads)
    rope, local_rope = hf_rope.parse(raw, head_dim)
    return HFConfig(
        architecture=architecture,
        has_own_code=bool(raw.get("auto_map")),
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        rms_norm_eps=float(raw["rms_norm_eps"]),
        activation=_activation(raw),
        rope=rope,
        local_rope=local_rope,
        layer_windows=_layer_windows(raw),
        attention_scale=float(raw.get("query_pre_attn_scalar") or head_dim) ** -0.5,
        attention_softcap=float(raw.get("attn_logit_softcapping") or 0),
        logit_softcap=float(raw.get("final_logit_softcapping") or 0),
        mixture=_mixture(raw),
        max_position_embeddings=hf_rope.trained_length(raw, rope.scaling),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        quantisation=hf_quantisation.parse(raw),
        eos_token_ids=_eos(raw, generation),
    )


def _activation(raw: Mapping[str, Any]) -> str:
    name = raw.get("hidden_activation") or raw.get("hidden_act") or "silu"
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} is not known; known ones: {', '.join(ACTIVATIONS)}")
    if raw.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is true: such a model embeds text and cannot continue it")
    return ACTIVATIONS[name]


def _layer_windows(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """From `layer_types` where there is one; before it, each family had a rule of its own."""
    layers, window = range(int(raw["num_hidden_layers"])), int(raw.get("sliding_window") or 0)
    if raw.get("use_sliding_window") is False:
        window = 0
    types, pattern = raw.get("layer_types"), raw.get("sliding_window_pattern")
    if types:
        if len(types) != len(layers):
            raise ValueError(f"layer_types names {len(types)} layers, not {len(layers)}")
        return tuple(window if types[i] == "sliding_attention" else 0 for i in layers)
    if pattern:
        return tuple(window if (i + 1) % int(pattern) else 0 for i in layers)
    is_late = raw["architectures"][0] in WINDOW_FROM_MAX_WINDOW_LAYERS
    first = int(raw["max_window_layers"]) if is_late else 0
    return tuple(window if i >= first else 0 for i in layers)


def _mixture(raw: Mapping[str, Any]) -> MixtureConfig | None:
    count = int(raw.get("num_experts") or raw.get("num_local_experts") or 0)
    if not count:
        return None
    step, plain = int(raw.get("decoder_sparse_step") or 1), raw.get("mlp_only_layers") or ()
    return MixtureConfig(
        num_experts=count,
        experts_per_token=int(raw["num_experts_per_tok"]),
        intermediate_size=int(raw.get("moe_intermediate_size") or raw["intermediate_size"]),
        normalise=bool(raw.get("norm_topk_prob", False)),
        layers=tuple(i not in plain and (i + 1) % step == 0 for i in range(int(raw["num_hidden_layers"]))),
    )


def _eos(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    ids: set[int] = set()
    for value in (raw.get("eos_token_id"), generation.get("eos_token_id")):
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(ids))


def _default_params(generation: Mapping[str, Any]) -> SamplingParams:
    """What generation_config.json recommends. A folder that says `do_sample: false` recommends the likeliest token."""
    names = ("repetition_penalty", *(() if generation.get("do_sample") is False else SAMPLING_FIELDS))
    stated = {name: generation[name] for name in names if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        stated["temperature"] = 0.0
    return msgspec.convert(stated, SamplingParams)
