"""What a step's requests change in their logits, gathered for the device: penalties, biases, bans and masks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pagoda_kernels import AllowedTokens, Bias, LogitsEdits, Penalties

from pagoda.errors import EngineFailure, InvalidRequest, PagodaError
from pagoda.plan import Chunk
from pagoda.request import Request, Status
from pagoda.sampling_params import SamplingParams
from pagoda.transfer import upload

log = logging.getLogger("pagoda.logits_edits")

T = TypeVar("T")
Failures: TypeAlias = "list[tuple[Chunk, PagodaError]]"
NEVER = float("-inf")


@dataclass(slots=True)
class Seen:
    """A request's distinct tokens, with how often each came in the output; grows with it."""

    tokens: NDArray[np.int32] = field(default_factory=lambda: np.zeros(256, np.int32))
    counts: NDArray[np.int32] = field(default_factory=lambda: np.zeros(256, np.int32))
    index: dict[int, int] = field(default_factory=dict)
    num_known: int = 0
    """Tokens of the request that have been counted."""

    def follow(self, request: Request) -> None:
        start = request.num_prompt_tokens
        if self.num_known == 0:
            self.num_known = start
            if request.params.repetition_penalty != 1:
                self._enter(request.prompt_ids, 0)
        self._enter(request.token_ids[self.num_known :], 1)
        self.num_known = len(request.token_ids)

    def _enter(self, token_ids: list[int], count: int) -> None:
        for token in token_ids:
            place = self.index.setdefault(token, len(self.index))
            if place == len(self.tokens):
                self.tokens = np.concatenate([self.tokens, np.zeros_like(self.tokens)])
                self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)])
            self.tokens[place] = token
            self.counts[place] += count


class EditsBuilder:
    """Keeps what requests have seen from step to step."""

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // 32)
        self._seen: dict[Request, Seen] = {}

    def build(self, chunks: list[Chunk], device: torch.device) -> tuple[LogitsEdits | None, Failures]:
        """The edits of a step, a row a chunk; None when nobody asks for any. And whose own part of them failed."""
        if not any(c.request.params.edits_logits for c in chunks):
            return None, []
        failures: Failures = []
        edits = LogitsEdits(
            self._penalties(chunks, device, failures),
            _bias(chunks, device, failures),
            self._allowed(chunks, device, failures),
        )
        return edits, failures

    def _penalties(self, chunks: list[Chunk], device: torch.device, failures: Failures) -> Penalties | None:
        seen, rows = [], []
        for row, chunk in enumerate(chunks):
            if _has_penalty(chunk.request.params) and (found := own(self._follow, chunk, failures)) is not None:
                seen.append(found)
                rows.append(np.full(len(found.index), row, np.int32))
        if not seen:
            return None
        params = [c.request.params for c in chunks]
        arrays: list[NDArray[Any]] = [
            np.array([p.repetition_penalty for p in params], np.float32),
            np.array([p.presence_penalty for p in params], np.float32),
            np.array([p.frequency_penalty for p in params], np.float32),
            np.concatenate(rows),
            np.concatenate([s.tokens[: len(s.index)] for s in seen]),
            np.concatenate([s.counts[: len(s.index)] for s in seen]),
        ]
        return Penalties(*upload(arrays, device))

    def _follow(self, request: Request) -> Seen:
        seen = self._seen.get(request)
        if seen is None:
            self._forget_ended()
            seen = self._seen[request] = Seen()
        seen.follow(request)
        return seen

    def _forget_ended(self) -> None:
        ended = [r for r in self._seen if r.status is Status.FINISHED]
        for request in ended:
            del self._seen[request]

    def _allowed(self, chunks: list[Chunk], device: torch.device, failures: Failures) -> AllowedTokens | None:
        masks: list[NDArray[np.int32]] = []
        rows = np.full(len(chunks), -1, np.int32)
        for row, chunk in enumerate(chunks):
            mask = own(self._mask, chunk, failures)
            if mask is not None:
                rows[row] = len(masks)
                masks.append(mask)
        return AllowedTokens(*upload([np.stack(masks), rows], device)) if masks else None

    def _mask(self, request: Request) -> NDArray[np.int32] | None:
        """The tokens that the request's grammar and its own list allow next, a bit each."""
        mask = None
        if request.matcher is not None:
            mask = np.zeros(self._words, np.int32)
            request.matcher.fill(mask)
        allowed = request.params.allowed_token_ids
        if allowed is not None:
            listed = _bits(allowed, self._words)
            mask = listed if mask is None else mask & listed
        return mask


def own(part: Callable[[Request], T], chunk: Chunk, failures: Failures) -> T | None:
    """What `part` makes of the chunk's request alone. If it raises, that request has failed and no other."""
    try:
        return part(chunk.request)
    except PagodaError as error:
        failures.append((chunk, error))
    except Exception:
        log.exception("sampling for request %r failed", chunk.request.key)
        failures.append((chunk, EngineFailure("the request's sampling failed; the server's log has the reason")))
    return None


def nothing_left(request: Request) -> InvalidRequest | None:
    """The error of a request that has barred every token; None when none of its fields bars any.

    A token drawn from logits that are all minus infinity is arbitrary: the request must end instead.
    """
    fields = _barring(request)
    if not fields:
        return None
    return InvalidRequest(
        f"after {request.num_output_tokens} output tokens every token is barred by {' and '.join(fields)}: allow more "
        "tokens, or leave out one of these fields",
        field=fields[0],
    )


def _barring(request: Request) -> list[str]:
    """The request's fields that bar tokens now, as clients name them."""
    params = request.params
    bars = {
        "allowed_token_ids": params.allowed_token_ids is not None,
        "bad_words": bool(params.bad_words),
        "min_tokens": request.num_output_tokens < params.min_tokens,
        "structured_outputs": params.structure is not None,
    }
    return [field for field, is_set in bars.items() if is_set]


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _bits(token_ids: tuple[int, ...], words: int) -> NDArray[np.int32]:
    bits = np.zeros(words * 32, np.uint8)
    bits[list(token_ids)] = 1
    packed: NDArray[np.int32] = np.packbits(bits, bitorder="little").view(np.int32)
    return packed


def _bias(chunks: list[Chunk], device: torch.device, failures: Failures) -> Bias | None:
    rows, tokens, values = [], [], []
    for row, chunk in enumerate(chunks):
        for token, value in (own(_biases, chunk, failures) or {}).items():
            rows.append(row)
            tokens.append(token)
            values.append(value)
    if not rows:
        return None
    return Bias(*upload([np.array(rows, np.int32), np.array(tokens, np.int32), np.array(values, np.float32)], device))


def _biases(request: Request) -> dict[int, float]:
    """Token to what is added to its logit; what must not come next gets minus infinity."""
    params = request.params
    if not (params.logit_bias or params.bad_words or params.min_tokens):
        return {}
    banned = [word[-1] for word in params.bad_words if _ends_with(request, word[:-1])]
    if request.num_output_tokens < params.min_tokens:
        banned += request.stop_ids
    return {**params.logit_bias, **dict.fromkeys(banned, NEVER)}


def _ends_with(request: Request, token_ids: tuple[int, ...]) -> bool:
    """True when the output ends with these tokens."""
    count = len(token_ids)
    return count == 0 or (count <= request.num_output_tokens and tuple(request.token_ids[-count:]) == token_ids)
