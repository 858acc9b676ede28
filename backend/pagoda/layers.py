"""The few parts a model page is written with. Each holds its weights as the checkpoint names them.

A layer is built on the meta device, filled by `pagoda.weights`, then `prepare`d: what the device's operations want
(on a CPU, packed weights) replaces what the file held.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from pagoda_kernels import Ops, PackedWeight
from torch import nn

from pagoda import rope
from pagoda.batch import Batch
from pagoda.hf_config import HFConfig
from pagoda.transfer import upload


class Layer(nn.Module):
    """A module with parameters of its own."""

    def places(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's names of what this layer, itself called `name`, holds, and where each goes: views."""
        for own, parameter in self.named_parameters(recurse=False):
            yield f"{name}.{own}", parameter.data

    def prepare(self) -> None:
        """Turn what the file held into what the operations want. Called once, when all places are filled."""


class Linear(Layer):
    """y = x Wᵀ + b, one or several of the checkpoint's matrices stacked by rows (`parts`: name to rows)."""

    def __init__(self, in_features: int, parts: dict[str, int] | int, ops: Ops, *, bias: bool = False) -> None:
        super().__init__()
        self.parts = parts if isinstance(parts, dict) else {}
        self.is_one_tensor = not self.parts
        """The checkpoint holds the parts as one tensor, under this layer's own name."""
        rows = parts if isinstance(parts, int) else sum(parts.values())
        self.weight = nn.Parameter(torch.empty(rows, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None
        self._ops = ops
        self._packed: PackedWeight | None = None

    def places(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        if self.is_one_tensor:
            yield from super().places(name)
            return
        parent = name.rpartition(".")[0]
        for own, parameter in self.named_parameters(recurse=False):
            views = torch.split(parameter.data, list(self.parts.values()))
            yield from ((f"{parent}.{part}.{own}", view) for part, view in zip(self.parts, views, strict=True))

    def prepare(self) -> None:
        self._packed = self._ops.pack_linear(self.weight.data)
        del self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] to [T, out]."""
        assert self._packed is not None, "prepare() comes before forward()"
        return self._ops.linear(x, self._packed, self.bias)


class GroupedLinear(Layer):
    """One matrix for each expert, stacked; the checkpoint holds those of expert e under `e.<part>` (name to rows)."""

    def __init__(self, num_experts: int, in_features: int, parts: dict[str, int], ops: Ops) -> None:
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(num_experts, sum(parts.values()), in_features), requires_grad=False)
        self._ops = ops

    def places(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        parent = name.rpartition(".")[0]
        for expert, matrix in enumerate(self.weight.data):
            views = torch.split(matrix, list(self.parts.values()))
            yield from (
                (f"{parent}.{expert}.{part}.weight", view) for part, view in zip(self.parts, views, strict=True)
            )

    def forward(self, x: torch.Tensor, expert_starts: torch.Tensor) -> torch.Tensor:
        """x [M, in], sorted by expert, to [M, out]; expert_starts [E + 1] int32."""
        return self._ops.grouped_linear(x, self.weight, expert_starts)


class Embedding(Layer):
    def __init__(self, vocab_size: int, hidden_size: int, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)
        self._ops = ops

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] to [T, hidden]."""
        return self._ops.embedding(token_ids, self.weight)


class RMSNorm(Layer):
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
    """Tables of rotary embeddings by layer. Not a checkpoint's tensor."""

    def __init__(self, config: HFConfig, max_model_len: int, device: torch.device) -> None:
        tables = rope.tables(config.rope, max_model_len, device)
        local = rope.tables(config.local_rope, max_model_len, device) if config.local_rope else tables
        self._tables = [local if window else tables for window in config.layer_windows]

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [max_model_len, rotated dimensions / 2] float32 each."""
        return self._tables[layer]


class KVCache:
    """Keys and values of every layer: [layers, num_blocks, block_size, kv_heads, head_dim] each."""

    def __init__(self, config: HFConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def copy(self, blocks: list[tuple[int, int]]) -> None:
        """Copy whole blocks, each (from, to), in every layer."""
        source, target = upload(list(np.array(blocks).T.copy()), self.keys.device)
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]


class Attention(nn.Module):
    """Rotates, writes the new keys and values to the cache, and attends over each request's blocks."""

    def __init__(self, config: HFConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.attention_scale
        window = config.layer_windows[layer]
        # One that no context can pass costs a mask and hides nothing.
        self.window = window if window < config.max_position_embeddings else 0
        self.softcap = config.attention_softcap
        self._ops = ops

    def forward(
        self,
        qkv: torch.Tensor,
        batch: Batch,
        rotary: Rotary,
        cache: KVCache,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
    ) -> torch.Tensor:
        """qkv [T, (heads + 2 kv_heads) * head_dim] to [T, heads * head_dim].

        norms: for each head of the queries and of the keys, applied before the rotation.
        """
        rows = qkv.view(qkv.shape[0], self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = torch.split(rows, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        cos, sin = rotary.of(self.layer)
        if norms is None:
            self._ops.rotary_kv_write(q, k, v, cos, sin, batch.positions, keys, values, batch.slots)
        else:
            q_norm, k_norm = norms
            self._ops.rotary_kv_write(
                q,
                k,
                v,
                cos,
                sin,
                batch.positions,
                keys,
                values,
                batch.slots,
                q_norm=q_norm.weight,
                k_norm=k_norm.weight,
                eps=q_norm.eps,
            )
        return self._ops.paged_attention(
            q, keys, values, batch.attention, self.scale, window=self.window, softcap=self.softcap
        ).flatten(1)
