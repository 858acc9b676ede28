"""Each model family's checkpoint in small, as transformers makes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from engine.parity import SHAPE, save, steady


@dataclass(frozen=True)
class Family:
    """A checkpoint that transformers can make. Windows and lengths are far below the 64 tokens that are compared."""

    name: str
    prefix: str
    """Of transformers' classes."""
    changes: dict[str, Any]
    without: dict[str, Any] = field(default_factory=dict)
    """Fields of HFConfig with values that take away what is special, each by itself."""

    def save(self, folder: Path, **options: Any) -> transformers.PreTrainedModel:
        config_class = getattr(transformers, f"{self.prefix.replace('Gemma3', 'Gemma3Text')}Config")
        return save(
            folder,
            config_class(**{**SHAPE, **self.changes}),
            getattr(transformers, f"{self.prefix}ForCausalLM"),
            **options,
        )


HEADS = {"head_dim": 16}
ALL_SEE_ALL = {"layer_windows": (0, 0, 0, 0)}
GEMMA = {**HEADS, "sliding_window": 16, "query_pre_attn_scalar": 24, "tie_word_embeddings": True}
ROTATED = 6
LONG = {
    "rope_type": "longrope",
    "short_factor": steady([1.0, 1.3, 2.1], ROTATED // 2),
    "long_factor": steady([1.5, 4.0, 9.0], ROTATED // 2),
}
MIXTURE = {"num_experts_per_tok": 3, "moe_intermediate_size": 24}

FAMILIES = (
    Family("mistral", "Mistral", {"sliding_window": 16}, ALL_SEE_ALL),
    Family("mistral without window, own head size", "Mistral", {"sliding_window": None, **HEADS}),
    Family("qwen2", "Qwen2", {}),
    Family("qwen2 tied", "Qwen2", {"tie_word_embeddings": True}),
    Family(
        "qwen2 with windows in the upper layers",
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        {"layer_windows": (16, 16, 16, 16)},
    ),
    Family("qwen3", "Qwen3", HEADS),
    Family("qwen3 with biases", "Qwen3", {**HEADS, "attention_bias": True}),
    Family(
        "gemma2",
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 1.0},
        {"attention_softcap": 0.0, "logit_softcap": 0.0, "attention_scale": 0.25, **ALL_SEE_ALL},
    ),
    Family("gemma2 without caps", "Gemma2", {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    Family(
        "gemma3",
        "Gemma3",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {"local_rope": None, "attention_scale": 0.25, **ALL_SEE_ALL},
    ),
    Family("phi3", "Phi3", {"sliding_window": 20}, ALL_SEE_ALL),
    Family(
        "phi3 longrope beyond the original context",
        "Phi3",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 32, "rope_parameters": LONG},
    ),
    Family(
        "phi3 longrope within the original context",
        "Phi3",
        {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 128, "rope_parameters": LONG},
    ),
    Family("qwen3 moe", "Qwen3Moe", {**HEADS, **MIXTURE, "num_experts": 10, "norm_topk_prob": True}),
    Family(
        "qwen3 moe with plain layers, raw shares",
        "Qwen3Moe",
        {
            **HEADS,
            **MIXTURE,
            "num_experts": 7,
            "norm_topk_prob": False,
            "mlp_only_layers": [3],
            "decoder_sparse_step": 2,
        },
    ),
    Family("mixtral", "Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 24}, ALL_SEE_ALL),
)
