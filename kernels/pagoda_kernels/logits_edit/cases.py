"""Shared cases of edit_logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..bench_loads import BenchLoad, Calls, randn
from ..dispatch import Ops
from . import EditLogits, reference
from .edits import AllowedTokens, Bias, LogitsEdits, Penalties


@dataclass(frozen=True)
class Case:
    """Random edits; every kind meets tokens that another kind edits too."""

    name: str
    rows: int = 5
    vocabulary: int = 300
    seen: int = 0
    """Tokens a row has seen."""
    biased: int = 0
    """Biased tokens a row; every fifth is forbidden."""
    masks: int = 0
    """Masks, of which every row but each third has one."""

    def make(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, LogitsEdits]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(self.rows, self.vocabulary, generator=generator) * 3
        edits = LogitsEdits(
            self._penalties(generator, device) if self.seen else None,
            self._bias(generator, device) if self.biased else None,
            self._allowed(generator, device) if self.masks else None,
        )
        return logits.to(device), edits

    def _pairs(self, each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return `each` distinct tokens for every row, in any order of the pairs."""
        tokens = torch.rand(self.rows, self.vocabulary, generator=generator).topk(each).indices.int()
        rows = torch.arange(self.rows, dtype=torch.int32).repeat_interleave(each)
        order = torch.randperm(len(rows), generator=generator)
        return rows[order], tokens.flatten()[order]

    def _penalties(self, generator: torch.Generator, device: str) -> Penalties:
        rows, tokens = self._pairs(self.seen, generator)
        counts = torch.randint(4, (len(rows),), generator=generator, dtype=torch.int32)
        repetition, presence, frequency = torch.rand(3, self.rows, generator=generator)
        parts = (repetition + 0.7, presence * 4 - 2, frequency * 4 - 2, rows, tokens, counts)
        return Penalties(*(part.to(device) for part in parts))

    def _bias(self, generator: torch.Generator, device: str) -> Bias:
        rows, tokens = self._pairs(self.biased, generator)
        values = torch.randn(len(rows), generator=generator) * 10
        values[::5] = float("-inf")
        return Bias(rows.to(device), tokens.to(device), values.to(device))

    def _allowed(self, generator: torch.Generator, device: str) -> AllowedTokens:
        words = -(-self.vocabulary // 32)
        bits = torch.randint(-(2**31), 2**31, (self.masks, words), generator=generator).int()
        rows = torch.arange(self.rows, dtype=torch.int32) * 7 % self.masks
        rows[2::3] = -1
        return AllowedTokens(bits.to(device), rows.to(device))


CASES = (
    Case("nothing"),
    Case("penalties", seen=40),
    Case("bias", biased=11),
    Case("mask", masks=3),
    Case("one_mask_for_all", masks=1),
    Case("everything", seen=200, biased=150, masks=2),
    Case("every_token_seen", rows=2, vocabulary=70, seen=70, biased=70, masks=2),
    Case("vocabulary_of_whole_words", vocabulary=320, masks=2, biased=10),
    Case("one_row", rows=1, seen=100, biased=30, masks=1),
    Case("one_token_vocabulary", rows=3, vocabulary=1, seen=1, biased=1, masks=1),
    Case("no_rows", rows=0, seen=1, biased=1, masks=1),
)


def bench_loads(device: torch.device) -> Iterator[BenchLoad]:
    """Requests that have seen 500 tokens each, with 20 biases; a mask for each; both."""
    requests, vocabulary = (256, 128256) if device.type == "cuda" else (16, 49152)
    seen = Case("seen", requests, vocabulary, seen=500, biased=20)
    masked = Case("masked", requests, vocabulary, masks=requests)

    def load(name: str, case: Case, moved: int) -> BenchLoad:
        edits_of_all = cache(lambda: case.make(str(device))[1])

        def make(ops: Ops, seed: int) -> Calls:
            logits = randn(requests, vocabulary, device=device, seed=seed)
            edits = edits_of_all()

            def run(edit_logits: EditLogits) -> Tensor:
                edit_logits(logits, edits)
                return logits

            return Calls(lambda: run(ops.edit_logits), lambda: run(reference.edit_logits))

        return BenchLoad(name, make, moved, bounds=(1e-5, 1e-5))

    # A touched logit costs a sector of 32 bytes each way, and its pair 8 or 12 bytes. A mask costs a bit a token and,
    # as a random one excludes a part of every sector, the two thirds of the rows that have one are read and written.
    yield load(f"{requests} rows, 500 seen and 20 biased", seen, requests * 520 * (64 + 12))
    yield load(f"{requests} rows, masks", masked, requests * vocabulary * 2 // 3 * 8 + requests * vocabulary // 8)
