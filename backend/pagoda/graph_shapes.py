"""Which steps have a CUDA graph: few shapes, so that capturing takes seconds, and enough to make padding cheap."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from pagoda.batch import SHARED_DECODES, Layout

SHORT_CONTEXT = 2048
"""Tokens: up to here a batch of any size is read in few parts, beyond it long requests are cut into more."""
MIXED_ROWS = 2048
"""Tokens of a mixed step. With more, the GPU takes several times as long as the launches of its kernels, one by one."""
MIXED_STEP = 128
FEW_DECODES = 16
"""Of a mixed step: each is read by more programs than one of many is."""
CHUNKS = 32
"""Prefill chunks of a mixed step."""
FEW_TOKENS = 1024
"""Of a mixed step's chunks: with more, it has no graph where attention has a faster way that graphs do not know:
reading the decodes' common prefix once, or copying contexts as long in the queries' dtype."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph has room for."""

    decodes: int
    """Requests that continue by one token."""
    rows: int
    """Tokens: as many as decodes, or a mixed step's, in which the chunks' follow the decodes that there are."""
    bound: int
    """Longest context of a request."""
    shares_prefix: bool = False
    """The decodes' common prefix is read once."""
    chunks: int = 0
    """Prefill chunks."""

    @property
    def requests(self) -> int:
        """As many hidden states come out."""
        return self.decodes + self.chunks


def fine(max_num_seqs: int) -> list[int]:
    """Numbers of decodes worth a graph, ascending: padding costs a sixth at most from 16 on."""
    steps = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, 512, 32), *range(512, max_num_seqs, 128)]
    return [size for size in steps if size < max_num_seqs] + [max_num_seqs]


def coarse(max_num_seqs: int) -> list[int]:
    """The same with a common prefix."""
    steps = [64, 128, 192, *range(256, max_num_seqs, 256)]
    return [size for size in steps if size < max_num_seqs] + [max_num_seqs]


class Shapes:
    """All graphs of an engine."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int, *, widens_cache: bool = False
    ) -> None:
        """widens_cache: the cache is of 8 bits, which attention may copy."""
        self._widens_cache = widens_cache
        self._bounds = [SHORT_CONTEXT, max_model_len] if max_model_len >= 2 * SHORT_CONTEXT else [max_model_len]
        self._fine = fine(max_num_seqs)
        self._coarse = coarse(max_num_seqs)
        self._beside_chunks = sorted({min(FEW_DECODES, max_num_seqs), max_num_seqs})
        most = min(MIXED_ROWS, max_num_batched_tokens)
        self._rows = list(range(MIXED_STEP, most + 1, MIXED_STEP))

    def all(self) -> list[Shape]:
        """The largest first: the others then find their memory in its."""
        longest = self._bounds[-1]
        shapes = [Shape(size, size, bound) for size in self._fine for bound in self._bounds]
        shapes += [Shape(size, size, longest, True) for size in self._coarse if size >= SHARED_DECODES]
        shapes += [Shape(size, rows, longest, chunks=CHUNKS) for size in self._beside_chunks for rows in self._rows]
        return sorted(shapes, key=lambda shape: (-shape.rows, -shape.requests, -shape.bound, shape.shares_prefix))

    def find(self, layout: Layout) -> Shape | None:
        """The smallest that holds a step; None where none does."""
        decodes = layout.num_decodes
        if len(layout.rows) > decodes:
            return self._find_mixed(layout)
        shared = layout.shared_prefix > 0
        size = _at_least(self._coarse if shared else self._fine, decodes)
        bound = _at_least(self._bounds[-1:] if shared else self._bounds, layout.longest)
        return None if size is None or bound is None else Shape(size, size, bound, shared)

    def _find_mixed(self, layout: Layout) -> Shape | None:
        decodes, count = layout.num_decodes, len(layout.token_ids)
        size, rows = _at_least(self._beside_chunks, decodes), _at_least(self._rows, count)
        if size is None or rows is None or layout.longest > self._bounds[-1] or len(layout.rows) - decodes > CHUNKS:
            return None
        widens = self._widens_cache and layout.context_lens[decodes:].max() > FEW_TOKENS
        has_faster_way = layout.shared_prefix > 0 or widens
        if layout.scores_prompts or (has_faster_way and count - decodes > FEW_TOKENS):
            return None
        return Shape(size, rows, self._bounds[-1], chunks=CHUNKS)


def _at_least(values: Sequence[int], least: int) -> int | None:
    """The first of ascending values that is not below `least`."""
    index = bisect_left(values, least)
    return values[index] if index < len(values) else None
