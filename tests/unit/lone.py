"""Requests, and what each gets where it runs alone: its tokens, and the trace that each of them leaves in memory."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable
from typing import Any

from pagoda.protocol import FinishReason
from pagoda.request import Request
from pagoda.sampling_params import SamplingParams

VOCAB = 50
MASK = (1 << 64) - 1


def make_request(
    key: Hashable,
    prompt_ids: Iterable[int],
    *,
    max_tokens: int = 8,
    stop_ids: Iterable[int] = (),
    seed: int = 0,
    salt: str = "",
    priority: int = 0,
    timeout: float | None = None,
    waits: bool = False,
) -> Request:
    """`waits`: the request's next token may depend on all tokens before it, so that it is never a step ahead."""
    params = SamplingParams(presence_penalty=1.0) if waits else SamplingParams()
    return Request(
        key,
        list(prompt_ids),
        params,
        max_tokens,
        frozenset(stop_ids),
        seed,
        cache_salt=salt,
        priority=priority,
        timeout=timeout,
    )


def make_group(keys: Iterable[Hashable], prompt_ids: Iterable[int], **rest: Any) -> Request:
    """A request whose forks answer the same prompt, each drawing with a seed of its own; the first key leads."""
    prompt, seed = list(prompt_ids), rest.pop("seed", 0)
    leader, *forks = [make_request(key, prompt, seed=seed + i, **rest) for i, key in enumerate(keys)]
    leader.forks = forks
    for fork in forks:
        fork.fork_of = leader
    return leader


def root_trace(salt: str) -> int:
    return zlib.crc32(salt.encode()) + 1


def mix(trace: int, token: int) -> int:
    trace = (trace * 6364136223846793005 + token * 1442695040888963407 + 1013904223) & MASK
    return trace ^ (trace >> 29)


def sample(trace: int, seed: int) -> int:
    return int(mix(trace ^ (seed & MASK), VOCAB) >> 33) % VOCAB


class Lone:
    """The tokens and traces of a request that runs alone, as far as anyone asked."""

    def __init__(self, prompt_ids: Iterable[int], seed: int, salt: str) -> None:
        self.seed = seed
        self.tokens: list[int] = []
        self.traces: list[int] = []
        self._last = root_trace(salt)
        for token in prompt_ids:
            self._append(token)

    def _append(self, token: int) -> None:
        self._last = mix(self._last, token)
        self.tokens.append(token)
        self.traces.append(self._last)

    def extend_to(self, length: int) -> Lone:
        while len(self.tokens) < length:
            self._append(sample(self._last, self.seed))
        return self


def lone_run(request: Request) -> tuple[list[int], FinishReason]:
    """The output of a request that shares the engine with nobody."""
    start = request.num_prompt_tokens
    lone = Lone(request.prompt_ids, request.seed, request.cache_salt)
    for count in range(1, request.max_tokens + 1):
        token = lone.extend_to(start + count).tokens[-1]
        if token in request.stop_ids:
            return lone.tokens[start:], "stop"
    return lone.tokens[start:], "length"
