"""Qwen2 and Qwen2.5: Llama whose projections to queries, keys and values have a bias. https://arxiv.org/abs/2412.15115"""

from __future__ import annotations

from pagoda.hf_config import HFConfig
from pagoda.models.llama import LlamaAttention, LlamaForCausalLM, LlamaLayer, LlamaModel


class Qwen2Attention(LlamaAttention):
    def has_qkv_bias(self, config: HFConfig) -> bool:
        return True


class Qwen2Layer(LlamaLayer):
    attention_class = Qwen2Attention


class Qwen2Model(LlamaModel):
    layer_class = Qwen2Layer


class Qwen2ForCausalLM(LlamaForCausalLM):
    model_class = Qwen2Model
