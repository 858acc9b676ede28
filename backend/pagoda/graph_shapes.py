"""Which steps have a CUDA graph: few shapes, so that capturing takes seconds, and enough to make padding cheap."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

SHORT_CONTEXT = 2048
"""Tokens: up to here a batch of any size is read in few parts, beyond it long requests are cut into more."""
MIXED_TOKENS = 1024
"""Prompt tokens of a mixed step: with more, the GPU takes longer than the launches of its kernels, one by one."""
MIXED_STEP = 128
CHUNKS = 16
"""Prefill chunks of a mixed step."""
SHARED_DECODES = 32
SHARED_TOKENS = 256
"""Decodes, and tokens of their common prefix, from which on it pays to read it once for all."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph has room for."""

    decodes: int
    """Requests that continue by one token."""
    tokens: int
    """Tokens of prefill chunks."""
    bound: int
    """Longest context of a request."""
    shares_prefix: bool = False
    """The decodes' common prefix is read once."""

    @property
    def chunks(self) -> int:
        return CHUNKS if self.tokens else 0

    @property
    def requests(self) -> int:
        return self.decodes + self.chunks

    @property
    def rows(self) -> int:
        """Rows that go into the model. As many as `requests` come out."""
        return self.decodes + self.tokens


def fine(max_num_seqs: int) -> list[int]:
    """Numbers of decodes worth a graph, ascending: padding costs a sixth at most from 16 on."""
    steps = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, 512, 32), *range(512, max_num_seqs, 128)]
    return [size for size in steps if size < max_num_seqs] + [max_num_seqs]


def coarse(max_num_seqs: int) -> list[int]:
    """The same beside prompts, or with a common prefix."""
    steps = [16, 64, 128, 192, *range(256, max_num_seqs, 256)]
    return [size for size in steps if size < max_num_seqs] + [max_num_seqs]


class Shapes:
    """All graphs of an engine."""

    def __init__(self, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int) -> None:
        self._bounds = [SHORT_CONTEXT, max_model_len] if max_model_len >= 2 * SHORT_CONTEXT else [max_model_len]
        self._fine = fine(max_num_seqs)
        self._coarse = coarse(max_num_seqs)
        most = min(MIXED_TOKENS, max_num_batched_tokens)
        self._tokens = list(range(MIXED_STEP, most + 1, MIXED_STEP))

    def all(self) -> list[Shape]:
        """The largest first: the others then find their memory in its."""
        longest = self._bounds[-1]
        shapes = [Shape(size, 0, bound) for size in self._fine for bound in self._bounds]
        shapes += [Shape(size, 0, longest, True) for size in self._coarse if size >= SHARED_DECODES]
        shapes += [Shape(size, tokens, longest) for size in self._coarse for tokens in self._tokens]
        return sorted(shapes, key=lambda shape: (-shape.rows, -shape.bound, shape.shares_prefix))

    def find(self, *, decodes: int, chunks: int, tokens: int, longest: int, shares_prefix: bool) -> Shape | None:
        """The smallest that holds a step; None where none does. `tokens` are those of `chunks`."""
        shared = shares_prefix and not tokens
        size = _at_least(self._coarse if shared or tokens else self._fine, decodes)
        padded = _at_least([0, *self._tokens], tokens)
        bound = _at_least(self._bounds[-1:] if shared or tokens else self._bounds, longest)
        if size is None or padded is None or bound is None or chunks > CHUNKS:
            return None
        return Shape(size, padded, bound, shared)


def _at_least(values: Sequence[int], least: int) -> int | None:
    """The first of ascending values that is not below `least`."""
    index = bisect_left(values, least)
    return values[index] if index < len(values) else None
