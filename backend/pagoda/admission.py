"""From a message to a request: everything about it is checked here, before the loop sees it."""

from __future__ import annotations

import secrets

import msgspec

from pagoda import sampling_params
from pagoda.protocol import Generate, ModelFacts
from pagoda.request import Request
from pagoda.sampling_params import SamplingParams


def admit(session: str, message: Generate, facts: ModelFacts) -> Request:
    """The request of a message, the others of its group as forks. Raises InvalidRequest naming field and value."""
    sampling_params.check(message.params, vocab_size=facts.vocab_size)
    sampling_params.check_request(
        n=message.n, priority=message.priority, timeout=message.timeout, cache_salt=message.cache_salt
    )
    sampling_params.check_prompt(message.prompt_ids, vocab_size=facts.vocab_size)
    limit = sampling_params.check_length(len(message.prompt_ids), message.params, max_model_len=facts.max_model_len)
    stop_ids = message.params.stop_ids(facts.eos_token_ids)
    return group([_member(session, message, index, limit, stop_ids) for index in range(message.n)])


def _member(session: str, message: Generate, index: int, limit: int, stop_ids: frozenset[int]) -> Request:
    return Request(
        key=(session, message.id + index),
        prompt_ids=message.prompt_ids,
        params=_params(message.params, index),
        max_tokens=limit,
        stop_ids=stop_ids,
        seed=_seed(message.params.seed, index),
        cache_salt=message.cache_salt,
        priority=message.priority,
        timeout=message.timeout,
    )


def _params(params: SamplingParams, index: int) -> SamplingParams:
    """The first of a group reports the prompt's log-probabilities for all."""
    if index == 0 or params.prompt_logprobs is None:
        return params
    return msgspec.structs.replace(params, prompt_logprobs=None)


def _seed(asked: int | None, index: int) -> int:
    """64 bits as a signed number."""
    bits = secrets.randbits(64) if asked is None else asked + index
    return (bits + 2**63) % 2**64 - 2**63


def group(requests: list[Request]) -> Request:
    """The first of these leads, the others fork from it."""
    leader, *forks = requests
    leader.fork_of, leader.forks = None, forks
    for fork in forks:
        fork.fork_of = leader
    return leader
