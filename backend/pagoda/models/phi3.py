"""Phi-3, Phi-3.5 and Phi-4(-mini): Llama whose checkpoint holds joined projections. https://arxiv.org/abs/2404.14219

Rotation of a part of each head, longrope and the sliding window are the configuration's.
"""

from __future__ import annotations

from pagoda_kernels import Ops

from pagoda.hf_config import HFConfig
from pagoda.models.llama import MLP, LlamaAttention, LlamaForCausalLM, LlamaLayer, LlamaMLP, LlamaModel


class Phi3Attention(LlamaAttention):
    def __init__(self, config: HFConfig, layer: int, ops: Ops) -> None:
        super().__init__(config, layer, ops)
        self.qkv_proj.is_one_tensor = True


class Phi3MLP(LlamaMLP):
    def __init__(self, config: HFConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        self.gate_up_proj.is_one_tensor = True


class Phi3Layer(LlamaLayer):
    attention_class = Phi3Attention

    def make_mlp(self, config: HFConfig, layer: int, ops: Ops) -> MLP:
        return Phi3MLP(config, ops)


class Phi3Model(LlamaModel):
    layer_class = Phi3Layer


class Phi3ForCausalLM(LlamaForCausalLM):
    model_class = Phi3Model
