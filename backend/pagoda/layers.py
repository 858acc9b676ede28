"""The few parts a model page is written with. Each holds its weights as the checkpoint names them.

A layer is built on the meta device, filled by `pagoda.weights`, then `prepare`d: what the device's operations want
(on a CPU, packed weights) replaces what the file held.
"""

from __future__ import annotations

import math

import torch
from pagoda_kernels import Ops, PackedWeight
from torch import nn

from pagoda.batch import Batch
from pagoda.hf_config import HFConfig, RopeScaling


class Linear(nn.Module):
    """y = x Wᵀ + b, one or several of the checkpoint's matrices stacked by rows (`parts`: name to rows)."""

    def __init__(self, in_features: int, parts: dict[str, int] | int, ops: Ops, *, bias: bool = False) -> None:
        super().__init__()
        self.parts = parts if isinstance(parts, dict) else {}
        rows = parts if isinstance(parts, int) else sum(parts.values())
        self.weight = nn.Parameter(torch.empty(rows, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None
        self._ops = ops
        self._packed: PackedWeight | None = None

    def prepare(self) -> None:
        self._packed = self._ops.pack_linear(self.weight.data)
        del self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] to [T, out]."""
        assert self._packed is not None, "prepare() comes before forward()"
        return self._ops.linear(x, self._packed, self.bias)


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] to [T, hidden]."""
        return nn.functional.embedding(token_ids, self.weight)


class RMSNorm(nn.Module):
    """With a residual, adds to it in place and normalises the sum (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps
        self._ops = ops

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None:
            return self._ops.rms_norm(x, self.weight, self.eps)
        return self._ops.add_rms_norm(x, residual, self.weight, self.eps)


class Rotary:
    """Tables of rotary embeddings, one row a position (https://arxiv.org/abs/2104.09864). Not a checkpoint's tensor."""

    def __init__(self, config: HFConfig, max_model_len: int, device: torch.device) -> None:
        angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), _inverse_frequencies(config))
        self.cos = angles.cos().to(device)
        self.sin = angles.sin().to(device)


def _inverse_frequencies(config: HFConfig) -> torch.Tensor:
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    return _scale_llama3(frequencies, config.rope_scaling) if config.rope_scaling else frequencies


def _scale_llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths are stretched by the factor, short ones kept, those between interpolated."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0, 1)
    return (1 - share) * frequencies / scaling.factor + share * frequencies


class KVCache:
    """Keys and values of every layer: [layers, num_blocks, block_size, kv_heads, head_dim] each."""

    def __init__(self, config: HFConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)


class Attention(nn.Module):
    """Rotates, writes the new keys and values to the cache, and attends over each request's blocks."""

    def __init__(self, config: HFConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        self._ops = ops

    def forward(self, qkv: torch.Tensor, batch: Batch, rotary: Rotary, cache: KVCache) -> torch.Tensor:
        """qkv [T, (heads + 2 kv_heads) * head_dim] to [T, heads * head_dim]."""
        rows = qkv.view(qkv.shape[0], self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = torch.split(rows, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        self._ops.rotary_kv_write(q, k, v, rotary.cos, rotary.sin, batch.positions, keys, values, batch.slots)
        return self._ops.paged_attention(q, keys, values, batch.attention, self.scale).flatten(1)
