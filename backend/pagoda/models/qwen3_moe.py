"""Qwen3-MoE: Qwen3 with a mixture of experts in most layers. https://arxiv.org/abs/2505.09388"""

from __future__ import annotations

from pagoda_kernels import Ops

from pagoda.hf_config import HFConfig
from pagoda.models.llama import MLP, LlamaForCausalLM, LlamaModel
from pagoda.models.mixture import SparseMLP
from pagoda.models.qwen3 import Qwen3Layer


class Qwen3MoeLayer(Qwen3Layer):
    def make_mlp(self, config: HFConfig, layer: int, ops: Ops) -> MLP:
        mixture = config.mixture
        if mixture is None or not mixture.layers[layer]:
            return super().make_mlp(config, layer, ops)
        return SparseMLP(config, mixture, ops)


class Qwen3MoeModel(LlamaModel):
    layer_class = Qwen3MoeLayer


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    model_class = Qwen3MoeModel
