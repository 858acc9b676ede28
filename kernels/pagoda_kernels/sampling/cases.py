"""Shared cases of sample."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..bench_loads import BenchLoad, Calls, bench_model, randn
from ..dispatch import Ops
from . import reference
from .batch import SamplingBatch


@dataclass(frozen=True)
class Row:
    """The parameters of one request."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0


def make_params(rows: list[Row], device: str = "cpu") -> SamplingBatch:
    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return SamplingBatch(
        temperature=column([row.temperature for row in rows], torch.float32),
        top_k=column([row.top_k for row in rows], torch.int32),
        top_p=column([row.top_p for row in rows], torch.float32),
        min_p=column([row.min_p for row in rows], torch.float32),
        seeds=column([signed(row.seed) for row in rows], torch.int64),
        positions=column([row.position for row in rows], torch.int64),
        all_greedy=all(row.temperature == 0 for row in rows),
        any_top_k=any(row.top_k > 0 for row in rows),
        any_top_p=any(row.top_p < 1 for row in rows),
        any_min_p=any(row.min_p > 0 for row in rows),
    )


def signed(seed: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit seed."""
    return seed - 2**64 if seed >= 2**63 else seed


@dataclass(frozen=True)
class Case:
    """Every request of the case has the parameters of `rows`, repeated in turn, and its own seed and position."""

    name: str
    rows: tuple[Row, ...]
    requests: int = 16
    vocabulary: int = 1000
    spread: float = 3.0
    """Standard deviation of the logits: a large one concentrates the mass."""

    def make(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, SamplingBatch]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(self.requests, self.vocabulary, generator=generator) * self.spread
        rows = [self.rows[i % len(self.rows)] for i in range(self.requests)]
        own = [
            Row(row.temperature, row.top_k, row.top_p, row.min_p, seed=2**64 - 1 - 7 * i, position=11 * i)
            for i, row in enumerate(rows)
        ]
        return logits.to(device), make_params(own, device)


_ALL = Row(0.7, 20, 0.9, 0.05)

CASES = (
    Case("greedy", (Row(0.0),)),
    Case("temperature", (Row(0.8),)),
    Case("top_k", (Row(top_k=5),)),
    Case("top_k_1", (Row(top_k=1),)),
    Case("top_k_beyond_vocabulary", (Row(top_k=5000),)),
    Case("top_p", (Row(top_p=0.9),)),
    Case("top_p_tiny", (Row(top_p=1e-6),)),
    Case("top_p_flat", (Row(2.0, top_p=0.95),), vocabulary=20000, spread=0.1),
    Case("top_k_then_top_p_flat", (Row(2.0, 700, 0.9), Row(2.0, 5000, 0.5)), vocabulary=9000, spread=0.5),
    Case("min_p", (Row(min_p=0.1),)),
    Case("min_p_1", (Row(min_p=1.0),)),
    Case("all_filters", (_ALL,)),
    Case("mixed", (Row(0.0), Row(), _ALL, Row(top_p=0.5), Row(top_k=3), Row(min_p=0.2)), requests=24),
    Case("mixed_large_vocabulary", (Row(), _ALL, Row(top_p=0.95), Row(top_k=3)), requests=8, vocabulary=49152),
    Case("one_request", (_ALL,), requests=1),
    Case("one_token_vocabulary", (Row(),), vocabulary=1),
    Case("no_requests", (Row(),), requests=0),
)


_BENCH_ROWS = {
    "greedy": Row(0.0),
    "temperature 0.8": Row(0.8),
    "top_k 50, top_p 0.9": Row(0.8, 50, 0.9),
    "top_p 0.9 of 0.3": Row(0.3, top_p=0.9),
    "top_p 0.9, flat": Row(top_p=0.9),
    "min_p 0.05": Row(min_p=0.05),
}


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """Logits with about the spread of a language model's. The flat top_p keeps some thousand tokens a row."""
    vocabulary = bench_model(device).vocabulary

    def load(requests: int, name: str, row: Row) -> BenchLoad:
        def make(ops: Ops, seed: int) -> Calls:
            logits = randn(requests, vocabulary, device=device, seed=seed).mul_(3)
            params = make_params([replace(row, seed=77 * i + 5, position=i) for i in range(requests)], str(device))
            return Calls(
                lambda: ops.sample(logits, params),
                lambda: reference.sample(logits, params),
                lambda: _torch_sample(logits, row),
            )

        return BenchLoad(f"{requests} x {vocabulary}, {name}", make, requests * vocabulary * 4)

    sizes = (256, 1) if device.type == "cuda" else (16, 1)
    return (load(requests, name, row) for requests in sizes for name, row in _BENCH_ROWS.items())


def _torch_sample(logits: Tensor, row: Row) -> Tensor:
    """Sample as a few lines of PyTorch do."""
    if row.temperature == 0:
        return logits.argmax(dim=-1)
    if row.top_k == 0 and row.top_p == 1:
        probabilities = (logits / row.temperature).softmax(dim=-1)
        kept = probabilities >= row.min_p * probabilities.amax(dim=-1, keepdim=True)
        return torch.multinomial(probabilities * kept, 1)
    ordered, ids = logits.topk(row.top_k) if row.top_k else logits.sort(dim=-1, descending=True)
    probabilities = (ordered / row.temperature).softmax(dim=-1)
    kept = probabilities.cumsum(dim=-1) - probabilities < row.top_p
    return ids.gather(1, torch.multinomial(probabilities * kept, 1))
