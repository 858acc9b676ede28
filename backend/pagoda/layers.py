"""The few parts a model page is written with. Each holds its weights as the checkpoint names them.

A layer is built on the meta device, filled by `pagoda.weights`, then `prepare`d: what the device's operations want
(on a CPU, packed weights) replaces what the file held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import torch
from pagoda_kernels import Ops
from pagoda_kernels.fp8_linear import Fp8Rows
from torch import nn

from pagoda import rope
from pagoda.batch import Batch
from pagoda.hf_config import HFConfig
from pagoda.storage.scheme import Field, Plain, PlainProduct, Product, Scheme
from pagoda.transfer import upload

Inputs: TypeAlias = torch.Tensor | Fp8Rows
"""What a Linear reads, [T, in]: rounded already only where its scheme `rounds_inputs`."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the checkpoint goes."""

    tensor: torch.Tensor
    """A view of the layer's memory."""
    default: float | None = None
    """What the checkpoint means when it leaves the tensor out; None: it must be there."""


class Layer(nn.Module):
    """A module with parameters of its own."""

    def places(self, name: str) -> Iterator[tuple[str, Place]]:
        """The checkpoint's names of what this layer, itself called `name`, holds, and where each goes."""
        for own, parameter in self.named_parameters(recurse=False):
            yield f"{name}.{own}", Place(parameter.data)

    def allocate(self, device: torch.device) -> None:
        """Take memory for what the places show: they are views of it from now on."""
        for own, parameter in list(self.named_parameters(recurse=False)):
            # Not empty_like: of a tensor on the meta device, it has torch import sympy, which takes two seconds.
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(self, own, nn.Parameter(memory, requires_grad=False))

    def make_up(self, deviation: float, generator: torch.Generator) -> None:
        """Fill the places at random: matrices with this standard deviation, vectors around 1."""
        for parameter in self.parameters(recurse=False):
            _make_up(parameter, deviation, generator)

    def prepare(self) -> None:
        """Turn what the file held into what the operations want. Called once, when all places are filled.

        Raises ValueError for contents that the operations cannot take.
        """


def _make_up(parameter: torch.Tensor, deviation: float, generator: torch.Generator) -> None:
    parameter.normal_(0.0, deviation, generator=generator)
    if parameter.dim() == 1:
        parameter.add_(1.0)


class Linear(Layer):
    """y = x Wᵀ + b, one or several of the checkpoint's matrices joined by rows (`parts`: name to rows).

    How a matrix is stored is its scheme's matter: plain, unless `store_as` says otherwise.
    """

    def __init__(self, in_features: int, parts: dict[str, int] | int, ops: Ops, *, bias: bool = False) -> None:
        super().__init__()
        self.parts = parts if isinstance(parts, dict) else {}
        self.is_one_tensor = not self.parts
        """The checkpoint holds the parts as one tensor, under this layer's own name."""
        self.in_features = in_features
        self.out_features = parts if isinstance(parts, int) else sum(parts.values())
        self._has_bias = bias
        self._ops = ops
        self._bias: torch.Tensor | None = None
        self._product: Product | None = None
        self.store_as(Plain())

    def store_as(self, scheme: Scheme) -> None:
        """Hold what the scheme asks for, in new parameters. Raises ValueError for sizes that it cannot hold."""
        self.scheme = scheme
        self._parameters.clear()
        for own, (first, *others) in self._fields().items():
            shape = list(first.shape)
            if first.outputs is None:
                shape.insert(0, 1 + len(others))
            else:
                shape[first.outputs] += sum(field.shape[first.outputs] for field in others)
            self.register_parameter(own, nn.Parameter(torch.empty(shape, dtype=first.dtype), requires_grad=False))

    def matrices(self, name: str) -> dict[str, int]:
        """The checkpoint's matrices that this layer, itself called `name`, consists of: name to rows."""
        if self.is_one_tensor:
            return {name: self.out_features}
        parent = name.rpartition(".")[0]
        return {f"{parent}.{part}": rows for part, rows in self.parts.items()}

    def _fields(self) -> dict[str, list[Field]]:
        """By a tensor's last name, what each of the matrices holds."""
        found: dict[str, list[Field]] = {}
        for rows in self.matrices("").values():
            fields = self.scheme.fields(rows, self.in_features)
            if self._has_bias:
                fields["bias"] = Field((rows,), torch.get_default_dtype(), 0)
            for own, field in fields.items():
                found.setdefault(own, []).append(field)
        return found

    def places(self, name: str) -> Iterator[tuple[str, Place]]:
        matrices, tensors = self.matrices(name), self._tensors()
        for own, fields in self._fields().items():
            data = tensors[own]
            along = fields[0].outputs
            views = data.unbind() if along is None else torch.split(data, [f.shape[along] for f in fields], along)
            for matrix, view, field in zip(matrices, views, fields, strict=True):
                yield f"{matrix}.{own}", Place(view, field.default)

    def make_up(self, deviation: float, generator: torch.Generator) -> None:
        tensors = self._tensors()
        bias = tensors.pop("bias", None)
        self.scheme.make_up(tensors, deviation, generator)
        if bias is not None:
            _make_up(bias, deviation, generator) if self._has_bias else bias.zero_()

    def prepare(self) -> None:
        tensors = self._tensors()
        bias = tensors.pop("bias", None)
        # A scheme may hold a bias for a layer that has none.
        self._bias = bias if bias is not None and (self._has_bias or bool(bias.any())) else None
        self._product = self.scheme.pack(tensors, list(self.matrices("").values()), self._ops)
        self._parameters.clear()

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {own: parameter.data for own, parameter in self.named_parameters(recurse=False)}

    def forward(self, x: Inputs) -> torch.Tensor:
        """x [T, in] to [T, out]."""
        assert self._product is not None, "prepare() comes before forward()"
        return self._product(x, bias=self._bias)

    def onto(self, x: Inputs, residual: torch.Tensor) -> torch.Tensor | None:
        """Add this layer's output to residual in place, or, where that is no faster, return what is yet to be added."""
        product = self._product
        if self._bias is None and isinstance(product, PlainProduct) and product.onto(cast(torch.Tensor, x), residual):
            return None
        return cast(torch.Tensor, self(x))

    def silu(self, x: Inputs, into: Linear) -> Inputs:
        """silu(gate) * up, [T, out / 2], for this layer's y = [gate | up], as the layer that it goes into wants it.

        One operation where the weight is plain.
        """
        if isinstance(self._product, PlainProduct):
            return self._product.silu(cast(torch.Tensor, x), bias=self._bias)
        return self._ops.silu_mul_fp8(self(x)) if into.scheme.rounds_inputs else self._ops.silu_mul(self(x))


class GroupedLinear(Layer):
    """One matrix for each expert, stacked; the checkpoint holds those of expert e under `e.<part>` (name to rows)."""

    def __init__(self, num_experts: int, in_features: int, parts: dict[str, int], ops: Ops) -> None:
        super().__init__()
        self.parts = parts
        self.weight = nn.Parameter(torch.empty(num_experts, sum(parts.values()), in_features), requires_grad=False)
        self._ops = ops

    def places(self, name: str) -> Iterator[tuple[str, Place]]:
        parent = name.rpartition(".")[0]
        for expert, matrix in enumerate(self.weight.data):
            views = torch.split(matrix, list(self.parts.values()))
            for part, view in zip(self.parts, views, strict=True):
                yield f"{parent}.{expert}.{part}.weight", Place(view)

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
    """Root mean square layer normalisation (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps
        self._ops = ops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """Of residual, after x, if there is any, has been added to it in place."""
        if x is None:
            return self.forward(residual)
        return self._ops.add_rms_norm(x, residual, self.weight, self.eps)

    def into(self, layer: Linear, x: torch.Tensor | None, residual: torch.Tensor) -> Inputs:
        """of_sum for the layer that alone will read it, as it wants it."""
        if layer.scheme.rounds_inputs and x is not None:
            return self._ops.add_rms_norm_fp8(x, residual, self.weight, self.eps)
        return self.of_sum(x, residual)


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
        self.is_scaled = dtype == torch.float8_e4m3fn
        """An entry is a key or value divided by its layer's scale."""

    def copy(self, blocks: list[tuple[int, int]]) -> None:
        """Copy whole blocks, each (from, to), in every layer."""
        source, target = upload(list(np.array(blocks).T.copy()), self.keys.device)
        for cache in (self.keys, self.values):
            # Not every torch writes 8-bit floats by index: their bytes are copied.
            data = cache.view(torch.uint8) if self.is_scaled else cache
            data[:, target] = data[:, source]


class Step(NamedTuple):
    """What every layer of a forward pass is given."""

    batch: Batch
    rotary: Rotary
    cache: KVCache
    outputs: torch.Tensor | None = None
    """[S] int64, the tokens to go on with after attention; None: all."""


class Attention(Layer):
    """Rotates, writes the new keys and values to the cache, and attends over each request's blocks.

    A checkpoint may hold scales for a cache of 8-bit floats, `k_scale` and `v_scale` beside the projections.
    """

    def __init__(self, config: HFConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.attention_scale
        window = config.layer_windows[layer]
        # One that no context can pass costs a mask and hides nothing.
        self.window = window if window < config.max_position_embeddings else 0
        self.softcap = config.attention_softcap
        for name in ("k_scale", "v_scale"):
            self.register_parameter(name, nn.Parameter(torch.empty((), dtype=torch.float32), requires_grad=False))
        self.cache_scales = (1.0, 1.0)
        """Of keys and values."""
        self._ops = ops

    def places(self, name: str) -> Iterator[tuple[str, Place]]:
        parent = name.rpartition(".")[0]
        for own, parameter in self.named_parameters(recurse=False):
            yield f"{parent}.{own}", Place(parameter.data, default=1.0)

    def make_up(self, deviation: float, generator: torch.Generator) -> None:
        for parameter in self.parameters(recurse=False):
            parameter.fill_(1.0)

    def prepare(self) -> None:
        k_scale, v_scale = (float(parameter) for parameter in self.parameters(recurse=False))
        if not (0 < k_scale < float("inf") and 0 < v_scale < float("inf")):
            raise ValueError(f"k_scale {k_scale} and v_scale {v_scale} must be positive: quantise the checkpoint again")
        self.cache_scales = k_scale, v_scale
        self._parameters.clear()

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
        k_scale, v_scale = self.cache_scales if cache.is_scaled else (1.0, 1.0)
        cos, sin = rotary.of(self.layer)
        if norms is None:
            self._ops.rotary_kv_write(
                q, k, v, cos, sin, batch.positions, keys, values, batch.slots, k_scale=k_scale, v_scale=v_scale
            )
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
                k_scale=k_scale,
                v_scale=v_scale,
            )
        attended = self._ops.paged_attention(
            q,
            keys,
            values,
            batch.attention,
            self.scale,
            window=self.window,
            softcap=self.softcap,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return attended.flatten(1)
