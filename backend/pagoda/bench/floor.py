"""The least time that the steps of a run can take on a machine: its bytes at full bandwidth, or its operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pagoda.bench.machine import Machine, matrices
from pagoda.hf_config import HFConfig
from pagoda.plan import Plan

FP8_KINDS = ("fp8", "fp8_on_load")
INT4_BYTES = 0.5 + 2.5 / 128
"""Of a 4-bit weight, with its share of a group's scale and zero."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Of a dense model; a step reads each weight once, and the cache of each of its requests once.

    Of tokens that are not sampled, the last layer's products are those to keys and values.
    """

    config: HFConfig
    """With the quantisation that the engine adds, if any."""
    itemsize: int
    """Bytes of a plain weight."""
    cache_itemsize: int
    machine: Machine

    @property
    def body_itemsize(self) -> float:
        """Bytes of a weight of the layers."""
        if self.config.quantisation is None:
            return self.itemsize
        return 1 if self.config.quantisation.kind in FP8_KINDS else INT4_BYTES

    @property
    def body_rate(self) -> float:
        """Operations a second in the products of the layers."""
        quantisation = self.config.quantisation
        is_fp8 = quantisation is not None and quantisation.kind in FP8_KINDS
        return self.machine.fp8_rate or self.machine.matrix_rate if is_fp8 else self.machine.matrix_rate

    def seconds(self, plans: Iterable[Plan]) -> float:
        """Of all steps, each bound by its bytes or by its operations."""
        return sum(self._step(plan) for plan in plans)

    def library_seconds(self, plans: Iterable[Plan]) -> float:
        """The same steps by the vendor's matrix products, with attention at its floor.

        Whoever runs on the same libraries takes longer on another machine about as this does.
        """
        return sum(self.machine.product_seconds(plan.num_tokens) + self._attention(plan) for plan in plans)

    def _step(self, plan: Plan) -> float:
        config = self.config
        layer = sum(rows * columns for rows, columns in matrices(config))
        last = layer - 2 * config.num_kv_heads * config.head_dim * config.hidden_size
        body = config.num_layers * layer
        sampled = sum(chunk.samples for chunk in plan.chunks)
        head = config.vocab_size * config.hidden_size
        bytes_read = body * self.body_itemsize + head * (sampled > 0) * self.itemsize + self._cache_bytes(plan)
        operations = 2 * head * sampled + self._attention_operations(plan)
        body_operations = 2 * (body - last) * plan.num_tokens + 2 * last * sampled
        seconds = body_operations / self.body_rate + operations / self.machine.matrix_rate
        return max(bytes_read / self.machine.bandwidth, seconds)

    def _attention(self, plan: Plan) -> float:
        seconds = self._attention_operations(plan) / self.machine.matrix_rate
        return max(self._cache_bytes(plan) / self.machine.bandwidth, seconds)

    def _cache_bytes(self, plan: Plan) -> int:
        contexts = sum(chunk.start + chunk.count for chunk in plan.chunks)
        return contexts * self.config.kv_elements_per_token * self.cache_itemsize

    def _attention_operations(self, plan: Plan) -> int:
        seen = sum(chunk.count * chunk.start + chunk.count * (chunk.count + 1) // 2 for chunk in plan.chunks)
        return 4 * self.config.num_layers * self.config.num_heads * self.config.head_dim * seen
