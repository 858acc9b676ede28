"""Llama (2 and 3.x, and whatever shares its architecture: SmolLM2, for one). https://arxiv.org/abs/2407.21783"""

from __future__ import annotations

import torch
from pagoda_kernels import Ops
from torch import nn

from pagoda.batch import Batch
from pagoda.hf_config import HFConfig
from pagoda.layers import Attention, Embedding, KVCache, Linear, RMSNorm, Rotary


class LlamaAttention(nn.Module):
    def __init__(self, config: HFConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = Linear(config.hidden_size, parts, ops, bias=config.attention_bias)
        self.attention = Attention(config, layer, ops)
        self.o_proj = Linear(q_size, config.hidden_size, ops, bias=config.attention_bias)

    def forward(self, x: torch.Tensor, batch: Batch, rotary: Rotary, cache: KVCache) -> torch.Tensor:
        return self.o_proj(self.attention(self.qkv_proj(x), batch, rotary, cache))


class LlamaMLP(nn.Module):
    def __init__(self, config: HFConfig, ops: Ops) -> None:
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = Linear(config.hidden_size, parts, ops, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, ops, bias=config.mlp_bias)
        self._ops = ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self._ops.silu_mul(self.gate_up_proj(x)))


class LlamaLayer(nn.Module):
    def __init__(self, config: HFConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.self_attn = LlamaAttention(config, layer, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.mlp = LlamaMLP(config, ops)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, batch: Batch, rotary: Rotary, cache: KVCache
    ) -> torch.Tensor:
        """x is this layer's input not yet added to `residual`, which is updated in place."""
        x = self.self_attn(self.input_layernorm(x, residual), batch, rotary, cache)
        return self.mlp(self.post_attention_layernorm(x, residual))


class LlamaModel(nn.Module):
    def __init__(self, config: HFConfig, ops: Ops) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, i, ops) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)

    def forward(self, batch: Batch, rotary: Rotary, cache: KVCache) -> torch.Tensor:
        x = self.embed_tokens(batch.token_ids)
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x = layer(x, residual, batch, rotary, cache)
        return self.norm(x, residual)


class LlamaForCausalLM(nn.Module):
    def __init__(self, config: HFConfig, ops: Ops) -> None:
        super().__init__()
        self.model = LlamaModel(config, ops)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, ops)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}

    def forward(self, batch: Batch, rotary: Rotary, cache: KVCache) -> torch.Tensor:
        return self.model(batch, rotary, cache)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)
