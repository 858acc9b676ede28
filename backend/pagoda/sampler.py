"""From a step's logits to its tokens: a row for each chunk that samples, by its own request's parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pagoda_kernels import Ops, SamplingBatch

from pagoda.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class Draw:
    """A step's samples on their way."""

    tokens: torch.Tensor
    """[S] int64 on the device."""


class Sampler:
    def __init__(self, ops: Ops, device: torch.device) -> None:
        self._ops = ops
        self._device = device

    def launch(self, chunks: list[Chunk], logits: torch.Tensor) -> Draw:
        """Draw one token for each chunk from logits [S, V] of any float type."""
        return Draw(self._ops.sample(logits.float(), _batch(chunks, self._device)))

    def collect(self, draw: Draw) -> list[int]:
        """The tokens; waits for the device."""
        tokens: list[int] = draw.tokens.tolist()
        return tokens


def _batch(chunks: list[Chunk], device: torch.device) -> SamplingBatch:
    params = [c.request.params for c in chunks]

    def column(values: list[int] | list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return SamplingBatch(
        temperature=column([p.temperature for p in params], torch.float32),
        top_k=column([max(p.top_k, 0) for p in params], torch.int32),
        top_p=column([p.top_p for p in params], torch.float32),
        min_p=column([p.min_p for p in params], torch.float32),
        seeds=column([c.request.seed for c in chunks], torch.int64),
        positions=column([c.start + c.count - c.request.num_prompt_tokens for c in chunks], torch.int64),
        all_greedy=all(p.temperature == 0 for p in params),
        any_top_k=any(p.top_k > 0 for p in params),
        any_top_p=any(p.top_p < 1 for p in params),
        any_min_p=any(p.min_p > 0 for p in params),
    )
