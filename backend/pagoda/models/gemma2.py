"""Gemma 2: norms around attention and MLP alike, windows in every other layer, capped logits. arXiv:2408.00118"""

from __future__ import annotations

from typing import ClassVar

import torch
from pagoda_kernels import Ops
from torch import nn

from pagoda.hf_config import HFConfig
from pagoda.layers import RMSNorm, Step
from pagoda.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP, LlamaModel


class GemmaRMSNorm(RMSNorm):
    """The checkpoint's weight is the distance from 1. The sum is kept in float32: 16 bits would lose digits of it."""

    def prepare(self) -> None:
        self.weight = nn.Parameter(1 + self.weight.float(), requires_grad=False)


class Gemma2Layer(nn.Module):
    attention_class: ClassVar[type[LlamaAttention]] = LlamaAttention

    def __init__(self, config: HFConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = GemmaRMSNorm(size, eps, ops)
        self.self_attn = self.attention_class(config, layer, ops)
        self.post_attention_layernorm = GemmaRMSNorm(size, eps, ops)
        self.pre_feedforward_layernorm = GemmaRMSNorm(size, eps, ops)
        self.mlp = LlamaMLP(config, ops)
        self.post_feedforward_layernorm = GemmaRMSNorm(size, eps, ops)

    def forward(self, x: torch.Tensor | None, residual: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        attention, mlp = self.self_attn, self.mlp
        attended, residual = attention.after(self.input_layernorm, x, residual, step)
        x = self.post_attention_layernorm(attention.o_proj(attended))
        x = mlp.down_proj(mlp.gated(self.pre_feedforward_layernorm, x, residual))
        return self.post_feedforward_layernorm(x), residual


class Gemma2Model(LlamaModel):
    layer_class = Gemma2Layer
    norm_class = GemmaRMSNorm

    def __init__(self, config: HFConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        # Rounded as the weights are, here to the dtype the model is built in: it was trained so.
        self.embedding_scale = torch.tensor(config.hidden_size**0.5, device="cpu").item()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(token_ids) * self.embedding_scale


class Gemma2ForCausalLM(LlamaForCausalLM):
    model_class = Gemma2Model

    def __init__(self, config: HFConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        self.softcap = config.logit_softcap

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits
