"""Mixtral: Mistral with a mixture of experts in every layer, under names of its own. https://arxiv.org/abs/2401.04088"""

from __future__ import annotations

from pagoda_kernels import Ops

from pagoda.errors import CheckpointError
from pagoda.hf_config import HFConfig
from pagoda.models.llama import MLP, LlamaForCausalLM, LlamaLayer, LlamaModel
from pagoda.models.mixture import ExpertNames, SparseMLP


class MixtralLayer(LlamaLayer):
    mlp_name = "block_sparse_moe"

    def make_mlp(self, config: HFConfig, layer: int, ops: Ops) -> MLP:
        if config.mixture is None:
            raise CheckpointError("config.json of a Mixtral lacks the key 'num_local_experts'")
        return SparseMLP(config, config.mixture, ops, ExpertNames("w1", "w3", "w2"))


class MixtralModel(LlamaModel):
    layer_class = MixtralLayer


class MixtralForCausalLM(LlamaForCausalLM):
    model_class = MixtralModel
