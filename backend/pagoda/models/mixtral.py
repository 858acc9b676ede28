"""Mixtral: Mistral with a mixture of experts in every layer, under names of its own. https://arxiv.org/abs/2401.04088"""

from __future__ import annotations

import torch
from pagoda_kernels import Ops

from pagoda.batch import Batch
from pagoda.errors import CheckpointError
from pagoda.hf_config import HFConfig
from pagoda.layers import KVCache, Rotary
from pagoda.models.llama import MLP, LlamaForCausalLM, LlamaLayer, LlamaModel
from pagoda.models.mixture import ExpertNames, SparseMLP


class MixtralLayer(LlamaLayer):
    def __init__(self, config: HFConfig, layer: int, ops: Ops) -> None:
        super().__init__(config, layer, ops)
        self.block_sparse_moe = self.mlp
        del self.mlp

    def make_mlp(self, config: HFConfig, layer: int, ops: Ops) -> MLP:
        if config.mixture is None:
            raise CheckpointError("config.json of a Mixtral lacks the key 'num_local_experts'")
        return SparseMLP(config, config.mixture, ops, ExpertNames("w1", "w3", "w2"))

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        batch: Batch,
        rotary: Rotary,
        cache: KVCache,
        outputs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.self_attn.after(self.input_layernorm, x, residual, batch, rotary, cache, outputs)
        return self.block_sparse_moe.after(self.post_attention_layernorm, x, residual), residual


class MixtralModel(LlamaModel):
    layer_class = MixtralLayer


class MixtralForCausalLM(LlamaForCausalLM):
    model_class = MixtralModel
