"""Shared cases of embedding."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from ..bench_loads import BenchLoad, Calls, bench_model, randn
from ..dispatch import Ops
from . import reference


@dataclass(frozen=True)
class Inputs:
    token_ids: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    hidden: int
    vocabulary: int = 300
    ids: torch.dtype = torch.int64

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        token_ids = torch.randint(self.vocabulary, (self.tokens,), generator=generator)
        token_ids[:2] = torch.tensor([self.vocabulary - 1, 0])[: self.tokens]
        weight = torch.randn(self.vocabulary, self.hidden, generator=generator)
        return Inputs(token_ids.to(device, self.ids), weight.to(device, dtype))


CASES = (
    Case("one_token", 1, 576),
    Case("no_tokens", 0, 576),
    Case("batch", 33, 576),
    Case("int32_ids", 9, 64, ids=torch.int32),
    Case("odd_width", 5, 77),
    Case("width_1", 3, 1),
    Case("wide", 3, 5000, vocabulary=7),
)


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """The model's table, with random tokens. It is larger than any cache: all sets of tokens look it up in one."""
    model = bench_model(device)
    table = cache(lambda: randn(model.vocabulary, model.hidden, device=device, seed=0, dtype=model.dtype))

    def load(rows: int) -> BenchLoad:
        def make(ops: Ops, seed: int) -> Calls:
            weight = table()
            ids = torch.randint(model.vocabulary, (rows,), generator=torch.Generator().manual_seed(seed)).to(device)
            return Calls(
                lambda: ops.embedding(ids, weight),
                lambda: reference.embedding(ids, weight),
                lambda: functional.embedding(ids, weight),
            )

        moved = 2 * rows * model.hidden * model.dtype.itemsize
        return BenchLoad(f"{rows} x {model.hidden}", make, moved, bounds=model.bounds)

    return (load(rows) for rows in model.rows)
