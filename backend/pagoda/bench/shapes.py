"""Models that are measured without a checkpoint: config.json alone, filled with random weights."""

from __future__ import annotations

import json
from pathlib import Path

SHAPES = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}
"""By the name that `pagoda bench` takes for a model; the values are the published config.json's."""


def write(name: str, folder: Path) -> Path:
    """Write a shape's config.json into a folder and return the folder. Raises KeyError for an unknown name."""
    (folder / "config.json").write_text(json.dumps(SHAPES[name]), "utf-8")
    return folder
