"""The architectures that can be served, by the name in config.json's `architectures`."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from pagoda_kernels import Ops

from pagoda.batch import Batch
from pagoda.errors import CheckpointError
from pagoda.hf_config import HFConfig
from pagoda.layers import KVCache, Rotary
from pagoda.models.gemma2 import Gemma2ForCausalLM
from pagoda.models.gemma3 import Gemma3ForCausalLM
from pagoda.models.llama import LlamaForCausalLM
from pagoda.models.mistral import MistralForCausalLM
from pagoda.models.mixtral import MixtralForCausalLM
from pagoda.models.phi3 import Phi3ForCausalLM
from pagoda.models.qwen2 import Qwen2ForCausalLM
from pagoda.models.qwen3 import Qwen3ForCausalLM
from pagoda.models.qwen3_moe import Qwen3MoeForCausalLM
from pagoda.storage import choice

log = logging.getLogger("pagoda.models")


class CausalLM(Protocol):
    """What the runner asks of a model."""

    def forward(self, batch: Batch, rotary: Rotary, cache: KVCache) -> torch.Tensor:
        """Hidden states [S, hidden] of a step's outputs; writes all tokens' keys and values to the cache."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden] to [S, vocab]."""
        ...


ARCHITECTURES: dict[str, type[LlamaForCausalLM]] = {
    model.__name__: model
    for model in (
        Gemma2ForCausalLM,
        Gemma3ForCausalLM,
        LlamaForCausalLM,
        MistralForCausalLM,
        MixtralForCausalLM,
        Phi3ForCausalLM,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
        Qwen3MoeForCausalLM,
    )
}


def build(config: HFConfig, ops: Ops) -> LlamaForCausalLM:
    """The model in the current default dtype, on the meta device: `weights` or `dummy_weights` give it its memory.

    Raises CheckpointError for an unknown architecture, and for matrices that cannot be stored as config.json says.
    """
    architecture = ARCHITECTURES.get(config.architecture)
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        own = "; code that a folder brings (auto_map) is never run" if config.has_own_code else ""
        raise CheckpointError(f"architecture {config.architecture!r} is not known; known ones: {known}{own}")
    if config.has_own_code:
        log.info("config.json points at code of its own (auto_map), which is not run: %s is built in", architecture)
    with torch.device("meta"):
        model = architecture(config, ops)
        choice.store(model, config.quantisation, model.tied)
    return model
