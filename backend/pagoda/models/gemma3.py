"""Gemma 3, text only: Gemma 2 with normalised heads instead of capped scores, and two rotations. arXiv:2503.19786

Layers with a window rotate by a base of their own, which is the configuration's.
"""

from __future__ import annotations

from pagoda_kernels import Ops

from pagoda.hf_config import HFConfig
from pagoda.layers import RMSNorm
from pagoda.models.gemma2 import Gemma2ForCausalLM, Gemma2Layer, Gemma2Model, GemmaRMSNorm
from pagoda.models.llama import LlamaAttention


class Gemma3Attention(LlamaAttention):
    def __init__(self, config: HFConfig, layer: int, ops: Ops) -> None:
        super().__init__(config, layer, ops)
        self.q_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps, ops)
        self.k_norm = GemmaRMSNorm(config.head_dim, config.rms_norm_eps, ops)

    def head_norms(self) -> tuple[RMSNorm, RMSNorm]:
        return self.q_norm, self.k_norm


class Gemma3Layer(Gemma2Layer):
    attention_class = Gemma3Attention


class Gemma3Model(Gemma2Model):
    layer_class = Gemma3Layer


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    model_class = Gemma3Model
