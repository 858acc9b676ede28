"""A mixture of experts in place of an MLP: each token is sent to a few of many small MLPs. arXiv:2101.03961

Nothing here waits for the device and no shape depends on the routing, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pagoda_kernels import Ops
from torch import nn

from pagoda.hf_config import HFConfig, MixtureConfig
from pagoda.layers import GroupedLinear, Linear
from pagoda.models.llama import MLP


class ExpertNames(NamedTuple):
    """The checkpoint's names of an expert's three matrices."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Experts(nn.Module):
    def __init__(self, config: HFConfig, mixture: MixtureConfig, ops: Ops, names: ExpertNames) -> None:
        super().__init__()
        count, size = mixture.num_experts, mixture.intermediate_size
        self.gate_up_proj = GroupedLinear(count, config.hidden_size, {names.gate: size, names.up: size}, ops)
        self.down_proj = GroupedLinear(count, size, {names.down: config.hidden_size}, ops)
        self._activate = ops.silu_mul if config.activation == "silu" else ops.gelu_mul

    def forward(self, x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self._activate(self.gate_up_proj(x, starts)), starts)


class SparseMLP(MLP):
    def __init__(self, config: HFConfig, mixture: MixtureConfig, ops: Ops, names: ExpertNames | None = None) -> None:
        super().__init__()
        self.gate = Linear(config.hidden_size, mixture.num_experts, ops)
        self.experts = Experts(config, mixture, ops, names or ExpertNames())
        self.num_experts, self.experts_per_token = mixture.num_experts, mixture.experts_per_token
        self.normalise = mixture.normalise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to [T, hidden]."""
        shares, chosen = self.route(x)
        order, starts = sort_by_expert(chosen.flatten(), self.num_experts)
        y = self.experts(x[order // self.experts_per_token], starts)
        back = torch.empty_like(y)
        back[order] = y
        by_token = back.view(*chosen.shape, x.shape[1])
        return (by_token.float() * shares.unsqueeze(-1)).sum(dim=1).to(x.dtype)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The shares of each token's experts, [T, k] float32, and which they are, [T, k] int64."""
        shares, chosen = torch.softmax(self.gate(x), dim=-1, dtype=torch.float32).topk(self.experts_per_token, dim=-1)
        if self.normalise:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        return shares, chosen


def sort_by_expert(chosen: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that sorts rows [M] by their expert, and where each expert's rows start, [num_experts + 1] int32."""
    experts, order = torch.sort(chosen, stable=True)
    bounds = torch.arange(num_experts + 1, device=chosen.device)
    return order, torch.searchsorted(experts, bounds, out_int32=True)
