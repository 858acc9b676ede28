"""Llama (2 and 3.x, and whatever shares its architecture: SmolLM2, for one). https://arxiv.org/abs/2407.21783

The trunk of the other families: their pages show how they differ from this one.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from pagoda_kernels import Ops
from torch import nn

from pagoda.batch import Batch
from pagoda.hf_config import HFConfig
from pagoda.layers import Attention, Embedding, Inputs, KVCache, Linear, RMSNorm, Rotary, Step
from pagoda.storage.scheme import Tied


class LlamaAttention(nn.Module):
    def __init__(self, config: HFConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = Linear(config.hidden_size, parts, ops, bias=self.has_qkv_bias(config))
        self.attention = Attention(config, layer, ops)
        self.o_proj = Linear(q_size, config.hidden_size, ops, bias=config.attention_bias)

    def has_qkv_bias(self, config: HFConfig) -> bool:
        return config.attention_bias

    def head_norms(self) -> tuple[RMSNorm, RMSNorm] | None:
        """What normalises each head of the queries and of the keys."""
        return None

    def after(
        self, norm: RMSNorm, x: torch.Tensor | None, residual: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What o_proj takes, [T, heads * D], of x and residual's normalised sum; and the sum, in residual's place.

        Both of the step's outputs alone, where it has some: [S, ...].
        """
        qkv = self.qkv_proj(norm.into(self.qkv_proj, x, residual))
        attended = self.attention(qkv, step.batch, step.rotary, step.cache, self.head_norms())
        if step.outputs is not None:
            attended, residual = attended[step.outputs], residual[step.outputs]
        return attended, residual


class MLP(nn.Module):
    """What follows attention in a layer."""

    def after(self, norm: RMSNorm, x: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor | None:
        """Of the sum of x and residual, normalised; residual becomes the sum. None: it is added to residual already."""
        return cast(torch.Tensor, self(norm.of_sum(x, residual)))


class LlamaMLP(MLP):
    def __init__(self, config: HFConfig, ops: Ops) -> None:
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = Linear(config.hidden_size, parts, ops, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, ops, bias=config.mlp_bias)
        self._gelu_mul = None if config.activation == "silu" else ops.gelu_mul

    def gated(self, norm: RMSNorm, x: torch.Tensor | None, residual: torch.Tensor) -> Inputs:
        """What down_proj takes, of the sum of x and residual, normalised; residual becomes the sum."""
        gate_up = self.gate_up_proj
        inputs = norm.into(gate_up, x, residual)
        return self._gelu_mul(gate_up(inputs)) if self._gelu_mul else gate_up.silu(inputs, self.down_proj)

    def after(self, norm: RMSNorm, x: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor | None:
        return self.down_proj.onto(self.gated(norm, x, residual), residual)


class LlamaLayer(nn.Module):
    attention_class: ClassVar[type[LlamaAttention]] = LlamaAttention
    mlp_name: ClassVar[str] = "mlp"
    """The checkpoint's name of what follows attention."""

    def __init__(self, config: HFConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.self_attn = self.attention_class(config, layer, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.add_module(self.mlp_name, self.make_mlp(config, layer, ops))

    def make_mlp(self, config: HFConfig, layer: int, ops: Ops) -> MLP:
        return LlamaMLP(config, ops)

    def forward(
        self, x: torch.Tensor | None, residual: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """x is what is not yet added to `residual`, if anything, before this layer and after it.

        Residual is updated in place.
        """
        attention = self.self_attn
        attended, residual = attention.after(self.input_layernorm, x, residual, step)
        x = attention.o_proj.onto(attended, residual)
        mlp: MLP = getattr(self, self.mlp_name)
        return mlp.after(self.post_attention_layernorm, x, residual), residual


class LlamaModel(nn.Module):
    layer_class: ClassVar[type[nn.Module]] = LlamaLayer
    norm_class: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, config: HFConfig, ops: Ops) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, ops)
        self.layers = nn.ModuleList(self.layer_class(config, i, ops) for i in range(config.num_layers))
        self.norm = self.norm_class(config.hidden_size, config.rms_norm_eps, ops)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(token_ids)

    def forward(self, batch: Batch, rotary: Rotary, cache: KVCache) -> torch.Tensor:
        """Hidden states [S, hidden]. After its attention, the last layer goes on with the batch's outputs alone."""
        residual = self.embed(batch.token_ids)
        x = None
        *layers, last = self.layers
        step = Step(batch, rotary, cache)
        for layer in layers:
            x, residual = layer(x, residual, step)
        x, residual = last(x, residual, step._replace(outputs=batch.outputs))
        return self.norm.of_sum(x, residual)


class LlamaForCausalLM(nn.Module):
    model_class: ClassVar[type[LlamaModel]] = LlamaModel

    def __init__(self, config: HFConfig, ops: Ops) -> None:
        super().__init__()
        self.model = self.model_class(config, ops)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, ops)
        self.tied: dict[str, str] = {}
        if config.tie_word_embeddings:
            self.lm_head.store_as(Tied(self.model.embed_tokens))
            self.tied = {"lm_head.weight": "model.embed_tokens.weight"}

    def forward(self, batch: Batch, rotary: Rotary, cache: KVCache) -> torch.Tensor:
        return self.model(batch, rotary, cache)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)
