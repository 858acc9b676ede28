"""Models that are measured without a checkpoint: config.json alone, filled with random weights."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

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


def write_servable(name: str, folder: Path) -> None:
    """The same with a tokenizer of the vocabulary's size, of made-up words: enough to serve it with dummy weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write(name, folder)
    size = int(str(SHAPES[name]["vocab_size"]))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(size)), "utf-8")
    template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), "utf-8")


def _tokenizer(size: int) -> dict[str, Any]:
    """Byte-level BPE without merges: every byte, then random words."""
    draw = random.Random(0)
    words = dict.fromkeys(ByteLevel.alphabet())
    while len(words) < size:
        letters = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 8)))
        words[draw.choice(("", "Ġ")) + letters] = None
    made = Tokenizer(BPE({word: i for i, word in enumerate(words)}, []))
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return dict(json.loads(made.to_str()))
