"""Qwen3: Llama that normalises each head of queries and keys before it is rotated. https://arxiv.org/abs/2505.09388"""

from __future__ import annotations

from pagoda_kernels import Ops

from pagoda.hf_config import HFConfig
from pagoda.layers import RMSNorm
from pagoda.models.llama import LlamaAttention, LlamaForCausalLM, LlamaLayer, LlamaModel


class Qwen3Attention(LlamaAttention):
    def __init__(self, config: HFConfig, layer: int, ops: Ops) -> None:
        super().__init__(config, layer, ops)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)

    def head_norms(self) -> tuple[RMSNorm, RMSNorm]:
        return self.q_norm, self.k_norm


class Qwen3Layer(LlamaLayer):
    attention_class = Qwen3Attention


class Qwen3Model(LlamaModel):
    layer_class = Qwen3Layer


class Qwen3ForCausalLM(LlamaForCausalLM):
    model_class = Qwen3Model
