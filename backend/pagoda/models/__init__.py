"""The architectures that can be served, by the name in config.json's `architectures`."""

from __future__ import annotations

from typing import Protocol

import torch
from pagoda_kernels import Ops

from pagoda.batch import Batch
from pagoda.errors import CheckpointError
from pagoda.hf_config import HFConfig
from pagoda.layers import KVCache, Rotary
from pagoda.models.llama import LlamaForCausalLM


class CausalLM(Protocol):
    """What the runner asks of a model."""

    def forward(self, batch: Batch, rotary: Rotary, cache: KVCache) -> torch.Tensor:
        """Hidden states [T, hidden] of a step's tokens; writes their keys and values to the cache."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden] to [S, vocab]."""
        ...


ARCHITECTURES: dict[str, type[LlamaForCausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
}


def build(config: HFConfig, ops: Ops) -> LlamaForCausalLM:
    """The model, on the current default device and dtype. Raises CheckpointError for an unknown architecture."""
    architecture = ARCHITECTURES.get(config.architecture)
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise CheckpointError(f"architecture {config.architecture!r} is not known; known ones: {known}")
    return architecture(config, ops)
