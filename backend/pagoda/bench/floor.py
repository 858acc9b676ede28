"""The least time that the steps of a run can take on a machine: its bytes at full bandwidth, or its operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pagoda.bench.machine import Machine, matrices
from pagoda.hf_config import HFConfig
from pagoda.plan import Plan


@dataclass(frozen=True, slots=True)
class Floor:
    """Of a dense model; a step reads each weight once, and the cache of each of its requests once."""

    config: HFConfig
    itemsize: int
    machine: Machine

    def seconds(self, plans: Iterable[Plan]) -> float:
        """Of all steps, each bound by its bytes or by its operations."""
        return sum(self._step(plan) for plan in plans)

    def _step(self, plan: Plan) -> float:
        config = self.config
        body = config.num_layers * sum(rows * columns for rows, columns in matrices(config))
        sampled = sum(chunk.samples for chunk in plan.chunks)
        head = config.vocab_size * config.hidden_size
        contexts = sum(chunk.start + chunk.count for chunk in plan.chunks)
        seen = sum(chunk.count * chunk.start + chunk.count * (chunk.count + 1) // 2 for chunk in plan.chunks)
        bytes_read = (body + head * (sampled > 0) + contexts * config.kv_elements_per_token) * self.itemsize
        operations = 2 * (body * plan.num_tokens + head * sampled)
        operations += 4 * config.num_layers * config.num_heads * config.head_dim * seen
        return max(bytes_read / self.machine.bandwidth, operations / self.machine.matrix_rate)
