"""What requests ask of the sampler, as numbers: a record each, so that a step gathers those of its requests at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagoda.request import Request

Wishes = NDArray[np.void]
"""Records of DTYPE."""

DTYPE = np.dtype(
    [
        ("seed", np.int64),
        ("num_prompt_tokens", np.int64),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("logprobs", np.bool_),
        ("prompt_logprobs", np.bool_),
        ("edits", np.bool_),
        ("matcher", np.bool_),
    ]
)
"""The flags say who wants log-probabilities, whose logits are edited, and who has a grammar."""


def record(request: Request) -> tuple[Any, ...]:
    """The fields of DTYPE."""
    params = request.params
    return (
        request.seed,
        request.num_prompt_tokens,
        params.temperature,
        max(params.top_k, 0),
        params.top_p,
        params.min_p,
        params.logprobs is not None,
        params.prompt_logprobs is not None,
        params.edits_logits,
        request.matcher is not None,
    )


def of(requests: Iterable[Request]) -> Wishes:
    """[R]"""
    return np.array([record(request) for request in requests], DTYPE)


def column(wishes: Wishes, name: str) -> NDArray[Any]:
    """A field of the records, [R], in memory of its own."""
    return wishes[name].copy()
