"""Shared cases of top_logprobs."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bench_loads import BenchLoad, Calls, bench_model, randn
from ..dispatch import Ops
from . import GetTopLogprobs, reference


@dataclass(frozen=True)
class Case:
    name: str
    k: int
    rows: int = 7
    vocabulary: int = 1000
    spread: float = 3.0
    levels: int = 0
    """Round the logits to multiples of 1 / levels, so that many are equal; 0 = off."""
    forbidden: float = 0.0
    """Share of the logits that is -inf."""

    def make(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return logits and tokens."""
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(self.rows, self.vocabulary, generator=generator) * self.spread
        if self.levels:
            logits = (logits * self.levels).round() / self.levels
        logits[torch.rand(logits.shape, generator=generator) < self.forbidden] = float("-inf")
        if self.rows > 0:
            logits[:, self.vocabulary // 2] = 0.5  # a row is never forbidden altogether
        tokens = torch.randint(self.vocabulary, (self.rows,), generator=generator)
        return logits.to(device), tokens.to(device)


CASES = (
    Case("only_the_token", 0),
    Case("best", 1),
    Case("five", 5),
    Case("twenty", 20),
    Case("equals", 20, levels=1),
    Case("all_equal", 20, spread=0.0),
    Case("mostly_forbidden", 20, forbidden=0.995),
    Case("one_row", 5, rows=1),
    Case("no_rows", 5, rows=0),
    Case("whole_vocabulary", 20, vocabulary=20, forbidden=0.5),
    Case("one_token_vocabulary", 1, vocabulary=1),
    Case("two_tiles", 20, rows=2, vocabulary=9000, levels=8),
)


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """A batch in which everyone asks for 20, and one request."""
    model = bench_model(device)

    def load(rows: int, k: int) -> BenchLoad:
        def make(ops: Ops, seed: int) -> Calls:
            logits = randn(rows, model.vocabulary, device=device, seed=seed) * 3
            tokens = logits[:, :100].argmax(dim=-1)

            def run(op: GetTopLogprobs) -> tuple[Tensor, ...]:
                found = op(logits, tokens, k)
                return found.logprob, found.rank, found.top_ids, found.top_logprobs

            def by_torch() -> object:
                logprobs = logits.log_softmax(dim=-1)
                own = logprobs.gather(1, tokens.unsqueeze(1))
                return logprobs.topk(k), (logprobs > own).sum(dim=-1)

            return Calls(lambda: run(ops.top_logprobs), lambda: run(reference.top_logprobs), by_torch)

        name = f"{rows} x {model.vocabulary}, k {k}"
        return BenchLoad(name, make, rows * model.vocabulary * 4, bounds=(1e-5, 1e-5))

    rows = 256 if device.type == "cuda" else 16
    return (load(rows, k) for rows, k in ((rows, 20), (rows, 0), (1, 20)))
