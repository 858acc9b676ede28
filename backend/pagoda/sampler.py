"""From a step's logits to its tokens: a row for each chunk that samples, by its own request's parameters.

What few requests ask for (penalties, masks, log-probabilities) costs a step nothing when none of its requests does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from pagoda_kernels import Ops, SamplingBatch

from pagoda.errors import EngineFailure
from pagoda.logits_edits import NEVER, EditsBuilder, Failures, nothing_left, own
from pagoda.plan import Chunk, Collected
from pagoda.protocol import TokenLogprob
from pagoda.request import Request
from pagoda.sampling_params import MAX_LOGPROBS
from pagoda.transfer import Download, upload
from pagoda.wishes import Wishes, column

MAX_SCORED_ROWS = 256
"""Rows of a prompt whose logits are computed at once: they take vocabulary-sized memory each."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A step's samples on their way."""

    chunks: list[Chunk]
    """Those that are sampled."""
    tokens: torch.Tensor
    """[S] int64 on the device."""
    arriving: Download
    """The tokens, their logits where `bars`, and the parts of `TopLogprobs` where log-probabilities are wanted."""
    bars: bool
    """Some request of the step may have barred tokens: their logits are minus infinity."""
    scored: list[int]
    """Rows of S whose requests want log-probabilities."""
    masked: list[int]
    """Rows of S whose requests have a grammar."""
    failures: Failures


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of prompt tokens on their way, by chunk."""

    chunks: list[Chunk]
    targets: list[list[int]]
    """The tokens that are scored, those that follow a chunk's own."""
    arriving: list[Download]
    """The parts of `TopLogprobs`, at most MAX_SCORED_ROWS rows each, over all targets in order."""


class Sampler:
    def __init__(self, ops: Ops, device: torch.device, vocab_size: int) -> None:
        self._ops = ops
        self._device = device
        self._edits = EditsBuilder(vocab_size)
        nothing = torch.zeros(0, device=device)
        self._greedy = SamplingBatch(nothing, nothing, nothing, nothing, nothing, nothing, True, False, False, False)

    def launch(self, chunks: list[Chunk], asked: Wishes, logits: torch.Tensor) -> Draw:
        """Draw one token for each chunk from logits [S, V] of any float type, which may be overwritten.

        asked: [S], what the chunks' requests ask for.
        """
        scored = asked["logprobs"].nonzero()[0].tolist()
        failures: Failures = []
        edits, raw = None, logits
        if asked["edits"].any():
            edits, failures = self._edits.build(chunks, self._device)
        if edits is not None:
            logits = logits.float()
            raw = logits.clone() if scored else logits
            self._ops.edit_logits(logits, edits)
        tokens = self._ops.sample(logits, self._batch(chunks, asked))
        arriving = [tokens]
        bars = edits is not None and (edits.bias is not None or edits.allowed is not None)
        if bars:
            arriving.append(logits.gather(1, tokens.unsqueeze(1)).squeeze(1))
        if scored:
            most = max(chunks[row].request.params.logprobs or 0 for row in scored)
            arriving += self._score(raw[scored].float(), tokens[scored], most)
        masked = asked["matcher"].nonzero()[0].tolist()
        return Draw(chunks, tokens, Download(arriving), bars, scored, masked, failures)

    def _score(self, logits: torch.Tensor, tokens: torch.Tensor, most: int) -> list[torch.Tensor]:
        """The parts of `TopLogprobs`, with `most` or more of the best: a GPU compiles for each number, so for two."""
        found = self._ops.top_logprobs(logits, tokens, min(MAX_LOGPROBS, logits.shape[1]) if most else 0)
        return [found.logprob, found.rank, found.top_ids, found.top_logprobs]

    def _batch(self, chunks: list[Chunk], asked: Wishes) -> SamplingBatch:
        if not asked["temperature"].any():
            return self._greedy
        columns = [column(asked, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")]
        places = np.array([c.start + c.count for c in chunks]) - asked["num_prompt_tokens"]
        temperature, top_k, top_p, min_p, seeds, positions = upload([*columns, places], self._device)
        return SamplingBatch(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seeds=seeds,
            positions=positions,
            all_greedy=False,
            any_top_k=bool((asked["top_k"] > 0).any()),
            any_top_p=bool((asked["top_p"] < 1).any()),
            any_min_p=bool((asked["min_p"] > 0).any()),
        )

    def score_prompts(
        self, chunks: list[Chunk], hidden: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> PromptScores | None:
        """Log-probabilities of the prompt tokens that follow those of a step, for the requests that want them.

        hidden: [T, hidden] of all chunks in order. `logits_of` gives [N, V] for [N, hidden].
        """
        wanted = [c for c in chunks if c.request.needs_prompt_logprobs]
        if not wanted:
            return None
        rows, targets = _prompt_rows(chunks)
        tokens = [token for group in targets for token in group]
        most = max(c.request.params.prompt_logprobs or 0 for c in wanted)
        arriving = []
        for first in range(0, len(rows), MAX_SCORED_ROWS):
            part = slice(first, first + MAX_SCORED_ROWS)
            places, expected = upload([np.array(rows[part]), np.array(tokens[part])], self._device)
            arriving.append(Download(self._score(logits_of(hidden[places]).float(), expected, most)))
        return PromptScores(wanted, targets, arriving)

    def collect(self, draw: Draw | None, prompts: PromptScores | None) -> Collected:
        """What a step brought; waits for the device."""
        prompt_logprobs = _read_prompts(prompts) if prompts is not None else ()
        if draw is None:
            return Collected([], None, prompt_logprobs)
        arrived = draw.arriving.wait()
        tokens: list[int] = arrived[0].tolist()
        logprobs: list[TokenLogprob | None] | None = None
        if draw.scored:
            logprobs = [None] * len(tokens)
            asked = [draw.chunks[row].request.params.logprobs or 0 for row in draw.scored]
            scored = _read([tokens[row] for row in draw.scored], asked, arrived[1 + draw.bars :])
            for row, logprob in zip(draw.scored, scored, strict=True):
                logprobs[row] = logprob
        failures = draw.failures + (_barred(draw.chunks, arrived[1].tolist()) if draw.bars else [])
        return Collected(tokens, logprobs, prompt_logprobs, failures + self._accept(draw, tokens, failures))

    def _accept(self, draw: Draw, tokens: list[int], failed_before: Failures) -> Failures:
        """Tell each grammar the token that came, but those that failed before it."""
        failed = {chunk.request for chunk, _ in failed_before}
        failures: Failures = []
        for row in draw.masked:
            chunk = draw.chunks[row]
            if not chunk.is_stale and chunk.request not in failed:
                own(partial(_follow_grammar, tokens[row]), chunk, failures)
        return failures


def _follow_grammar(token: int, request: Request) -> None:
    if request.matcher is not None and not request.matcher.accept(token):
        raise EngineFailure(f"token {token} does not follow the grammar")


def _barred(chunks: list[Chunk], logits: list[float]) -> Failures:
    """The chunks whose drawn token has a logit of minus infinity: every token was barred. One logit a chunk."""
    empty = [chunk for chunk, logit in zip(chunks, logits, strict=True) if logit == NEVER]
    return [(chunk, error) for chunk in empty if (error := nothing_left(chunk.request)) is not None]


def _prompt_rows(chunks: list[Chunk]) -> tuple[list[int], list[list[int]]]:
    """Rows of a step whose next token is known and wanted, and for each chunk that wants any, these tokens."""
    rows: list[int] = []
    targets = []
    start = 0
    for chunk in chunks:
        request = chunk.request
        if request.needs_prompt_logprobs:
            first = max(chunk.start, len(request.prompt_logprobs))
            last = min(chunk.start + chunk.count, request.num_prompt_tokens - 1)
            rows += range(start + first - chunk.start, start + last - chunk.start)
            targets.append(request.prompt_ids[first + 1 : last + 1])
        start += chunk.count
    return rows, targets


def _read_prompts(prompts: PromptScores) -> list[tuple[Chunk, list[TokenLogprob]]]:
    tokens = [token for group in prompts.targets for token in group]
    asked = [
        chunk.request.params.prompt_logprobs or 0
        for chunk, group in zip(prompts.chunks, prompts.targets, strict=True)
        for _ in group
    ]
    scores: list[TokenLogprob] = []
    for download in prompts.arriving:
        part = slice(len(scores), len(scores) + MAX_SCORED_ROWS)
        scores += _read(tokens[part], asked[part], download.wait())
    following = iter(scores)
    return [
        (chunk, [next(following) for _ in group]) for chunk, group in zip(prompts.chunks, prompts.targets, strict=True)
    ]


def _read(tokens: list[int], asked: list[int], parts: Sequence[torch.Tensor]) -> Iterator[TokenLogprob]:
    """Parts of `TopLogprobs` on the host as what travels; of the best tokens, as many as each row asked for."""
    logprobs, ranks, ids, values = (part.tolist() for part in parts)
    for row, token in enumerate(tokens):
        top = list(zip(ids[row][: asked[row]], values[row][: asked[row]], strict=True))
        yield TokenLogprob(token, logprobs[row], ranks[row], top)
